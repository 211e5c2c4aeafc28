"""A Hugging Face folder's model, and steps of its cache."""

from pathlib import Path
from typing import Any, Literal

import torch
from torch import Tensor

from megatron_dmc.config import ConfigError
from megatron_dmc.convert.families import FAMILIES
from megatron_dmc.convert.hf_config import read_config
from megatron_dmc.convert.weights import Weights
from megatron_dmc.errors import in_one_line
from megatron_dmc.hf.cache import CACHE_NAME


def bf16_is_fast() -> bool:
    """Whether this machine multiplies in bfloat16 faster than in float32: a GPU, or a CPU with instructions for it."""
    # Not public, and not in every version of torch.
    has = (getattr(torch.cpu, f"_is_{name}_supported", bool) for name in ("avx512_bf16", "amx_tile"))
    return torch.cuda.is_available() or any(each() for each in has)


def loss_dtype() -> torch.dtype:
    """Of a loss on text. On a CPU float32: rounding to bfloat16 alone moves SmolLM2-135M by a KL of 0.0013."""
    return torch.bfloat16 if torch.cuda.is_available() else torch.float32  # a GPU's attention takes no other


def serving_dtype() -> torch.dtype:
    """That a model is served in on this machine."""
    return torch.bfloat16 if bf16_is_fast() else torch.float32


def check_cache_dtype(folder: str | Path, merges: bool, cache_dtype: str | None) -> None:
    """Raises ConfigError unless the model's cache can be kept in it, see DMCConfiguration. merges: it was retrofitted."""
    if cache_dtype is not None and not merges:
        raise ConfigError(
            f"--cache-dtype {cache_dtype}: {folder} is a plain model, whose cache transformers keeps; leave it out"
        )


def load(folder: str | Path, dtype: torch.dtype | Literal["auto"] | None = None, attention: str | None = None) -> Any:
    """The model in eval mode on the first GPU, or on the CPU: a plain one, or an export with its compressed cache.

    ``dtype`` None is that of a loss, "auto" the one in which the weights are stored. ``attention`` is one of transformers'
    implementations; None: its own choice.

    Nothing of the folder's own code is run: an export's is this package's.

    Raises:
        ConfigError: the folder holds no such model, transformers cannot load it, or its weights are another's.
    """
    import transformers
    from transformers import logging

    from megatron_dmc.hf.families import dmc_classes

    # What is missing, damaged or mixed is better said here than by what transformers meets first.
    config, dmc = read_config(Path(folder))
    Weights.of(Path(folder), config, dmc)
    logging.set_verbosity_error()
    logging.disable_progress_bar()
    try:
        architecture = FAMILIES[config.family].architecture
        kind = getattr(transformers, architecture) if dmc is None else dmc_classes(config.family)[1]
        settings = {} if attention is None else {"attn_implementation": attention}
        model = kind.from_pretrained(folder, dtype=dtype or loss_dtype(), return_dict=True, **settings)
    # transformers raises whatever it happens to meet.
    except Exception as error:
        raise ConfigError(f"{folder} cannot be loaded: {in_one_line(error)}; convert or fetch it again") from None
    return model.eval().to("cuda" if torch.cuda.is_available() else "cpu")


def extend(model: Any, tokens: Tensor, cache: Any = None, *, last_only: bool = False) -> tuple[Tensor, Any]:
    """Takes tokens [seq] into a cache, a new one where none is given.

    Returns:
        logits [seq, vocabulary], those of the last token only ([1, vocabulary]) on request, on the model's device; and the
        cache.
    """
    made = model(tokens[None].to(model.device), use_cache=True, logits_to_keep=int(last_only), **{CACHE_NAME: cache})
    return made.logits[0], made[CACHE_NAME]


def cache_bytes(cache: Any) -> int:
    """Bytes that a cache holds: the compressed one's own count, or the sum of a plain one's tensors."""
    if hasattr(cache, "nbytes"):
        return int(cache.nbytes)
    return sum(x.nbytes for layer in cache.layers for x in (layer.keys, layer.values))
