"""What a model's cache holds after a text, and how fast the model goes on from there."""

import time
from typing import Any

import torch
from torch import Tensor

from megatron_dmc.evaluation.exported.model import cache_bytes, extend

_WARM_UP_TOKENS = 64


@torch.inference_mode()
def serving(model: Any, text: Tensor, new_tokens: int) -> dict[str, Any]:
    """Prefill of one text, int64 [tokens], then greedy decoding. The first call pays for imports and allocations beforehand.

    Returns:
        cache_bytes; seconds_to_first_token; tokens_per_second of decoding; and of a compressed cache compression_ratio and
        layer_head_compression_ratio, tokens per slot [layers][kv_heads], all of the text alone.
    """
    extend(model, text[:1], extend(model, text[:_WARM_UP_TOKENS], last_only=True)[1])
    began = _now(model)
    logits, cache = extend(model, text, last_only=True)
    token = logits[-1].argmax()[None]
    seconds = _now(model) - began
    found: dict[str, Any] = {"cache_bytes": cache_bytes(cache), "seconds_to_first_token": seconds}
    if hasattr(cache, "slots"):
        ratio = len(text) / cache.slots[:, 0].double()
        found["compression_ratio"] = float(1 / (1 / ratio).mean())
        found["layer_head_compression_ratio"] = ratio.tolist()
    began = _now(model)
    for _ in range(new_tokens):
        logits, cache = extend(model, token, cache)
        token = logits[-1].argmax()[None]
    found["tokens_per_second"] = new_tokens / (_now(model) - began)
    return found


def _now(model: Any) -> float:
    """Seconds, once a GPU has done all that it was told to."""
    if model.device.type == "cuda":
        torch.cuda.synchronize()
    return time.perf_counter()
