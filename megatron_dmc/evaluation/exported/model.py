"""A Hugging Face folder's model, and steps of its cache."""

from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from megatron_dmc.config import ConfigError
from megatron_dmc.convert.hf_config import read_config
from megatron_dmc.hf.cache import CACHE_NAME


def load(folder: str | Path) -> Any:
    """The model in float32, in eval mode: a plain Llama, or an export with its compressed cache.

    Raises:
        ConfigError: the folder holds no such model, or transformers cannot load it.
    """
    from transformers import AutoModelForCausalLM, logging

    read_config(Path(folder))
    logging.set_verbosity_error()
    logging.disable_progress_bar()
    try:
        model = AutoModelForCausalLM.from_pretrained(folder, trust_remote_code=True, dtype=torch.float32)
    # transformers raises whatever it happens to meet.
    except Exception as error:
        raise ConfigError(f"{folder} cannot be loaded: {' '.join(str(error).split())[:300]}") from None
    return model.eval()


def extend(model: Any, tokens: Tensor, cache: Any = None, *, last_only: bool = False) -> tuple[Tensor, Any]:
    """Takes tokens [seq] into a cache, a new one where none is given.

    Returns:
        logits [seq, vocabulary], those of the last token only ([1, vocabulary]) on request; and the cache.
    """
    made = model(tokens[None], use_cache=True, logits_to_keep=int(last_only), **{CACHE_NAME: cache})
    return made.logits[0], made[CACHE_NAME]


def cache_bytes(cache: Any) -> int:
    """Bytes that a cache holds: the compressed one's own count, or the sum of a plain one's tensors."""
    if hasattr(cache, "nbytes"):
        return int(cache.nbytes)
    return sum(x.nbytes for layer in cache.layers for x in (layer.keys, layer.values))
