"""What a model's cache holds after a text, and how fast the model goes on from there."""

import time
from typing import Any

import torch
from torch import Tensor

from megatron_dmc.evaluation.exported.method import AsItIs, Method

_WARM_UP_TOKENS = 128


@torch.inference_mode()
def serving(model: Any, text: Tensor, new_tokens: int, method: Method | None = None) -> dict[str, Any]:
    """Prefill of one text, int64 [tokens], then greedy decoding. The first call pays for imports and allocations beforehand.

    Args:
        method: None: the model as it is.

    Returns:
        cache_bytes; seconds_to_first_token; tokens_per_second of decoding; and of a compressed cache compression_ratio and
        layer_head_compression_ratio, tokens per slot [layers][kv_heads], all of the text alone.
    """
    method = AsItIs() if method is None else method
    method.extend(model, text[:1], method.read(model, text[:_WARM_UP_TOKENS])[1])
    began = _now(model)
    logits, cache = method.read(model, text)
    token = logits[-1].argmax()[None]
    seconds = _now(model) - began
    found: dict[str, Any] = {"cache_bytes": method.nbytes(model, cache), "seconds_to_first_token": seconds}
    if (slots := method.slots(model, cache)) is not None:
        ratio = len(text) / slots.double()
        found["compression_ratio"] = float(1 / (1 / ratio).mean())
        found["layer_head_compression_ratio"] = ratio.tolist()
    began = _now(model)
    for _ in range(new_tokens):
        logits, cache = method.extend(model, token, cache)
        token = logits[-1].argmax()[None]
    found["tokens_per_second"] = new_tokens / (_now(model) - began)
    return found


def _now(model: Any) -> float:
    """Seconds, once a GPU has done all that it was told to."""
    if model.device.type == "cuda":
        torch.cuda.synchronize()
    return time.perf_counter()
