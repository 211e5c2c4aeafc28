"""The model section that a base checkpoint brings, and when two model sections are the same model's."""

import json
from collections.abc import Mapping
from dataclasses import asdict, replace
from pathlib import Path
from typing import Any

import numpy as np

from megatron_dmc.config import ConfigError
from megatron_dmc.model.model_config import ModelConfig
from megatron_dmc.recipe.values import SectionReader

# Settings that may differ between a checkpoint and a run: they do not change what the weights mean.
FREE_SETTINGS = frozenset({"init_method_std", "max_position_embeddings"})
# Megatron pads a vocabulary to a multiple of 128 per tensor-parallel rank. A difference beyond that is another model's.
MOST_ADDED_TOKENS = 1024
# An error names so many settings that differ.
SHOWN_DIFFERENCES = 3


def has_base(folder: str) -> bool:
    """Whether a base's description is on this machine."""
    return (Path(folder) / "dmc.json").is_file()


def model_of_base(folder: str, typed: Mapping[str, Any]) -> ModelConfig:
    """The model of a base checkpoint, with what the recipe says itself.

    Args:
        folder: ``checkpoint.load_base``.
        typed: the settings of the recipe's model section that the recipe gives, typed.

    Raises:
        ConfigError: ``dmc.json`` is damaged, or the recipe's model is another than the base's.
    """
    path = Path(folder) / "dmc.json"
    # The checkpoint as a whole is checked when its weights are loaded. This is all that a recipe needs of it.
    try:
        values = json.loads(path.read_text(encoding="utf-8"))["recipe"]["model"]
    except (OSError, ValueError, KeyError, TypeError, RecursionError) as error:
        raise ConfigError(
            f"checkpoint.load_base: {path} is damaged, it holds no model section "
            f"({type(error).__name__}: {error}); name another base"
        ) from None
    reader = SectionReader(from_person=False)
    try:
        saved = reader.section(values, ModelConfig, "model")
    except ConfigError as error:
        raise ConfigError(f"checkpoint.load_base: {path} is not understood by this version: {error}") from None
    if reader.missing:
        raise ConfigError(f"checkpoint.load_base: {path} is damaged, it lacks {', '.join(reader.missing)}")
    model = replace(saved, **typed)
    padded = replace(saved, vocab_size=saved.vocab_size + added_tokens(saved.vocab_size, model.vocab_size))
    differences = model_differences(asdict(padded), asdict(model))
    if differences:
        more = len(differences) - SHOWN_DIFFERENCES
        raise ConfigError(
            f"the model section is not that of checkpoint.load_base {folder}: {'; '.join(differences[:SHOWN_DIFFERENCES])}"
            f"{f'; and {more} more' if more > 0 else ''}; leave the section out (it is then taken from the base), or name "
            "another base"
        )
    return model


def added_tokens(of_base: int, size: int) -> int:
    """By how many tokens a vocabulary pads its base's, as tensor parallelism may need; 0: it does not."""
    return size - of_base if of_base < size < of_base + MOST_ADDED_TOKENS else 0


def model_differences(saved: Mapping[str, Any], mine: Mapping[str, Any]) -> list[str]:
    """What makes two model sections (plain values) two models, one phrase for each setting."""
    saved, mine = _with_head_dim(saved), _with_head_dim(mine)
    return [
        f"model.{name} is {saved.get(name)!r} there, {mine.get(name)!r} here"
        for name in sorted({*saved, *mine} - FREE_SETTINGS)
        if not _same(saved.get(name), mine.get(name))
    ]


def _same(a: Any, b: Any) -> bool:
    """Equal; floats as float32, which is what models compute with and what other tools round settings to."""
    numbers = all(isinstance(value, int | float) and not isinstance(value, bool) for value in (a, b))
    if numbers and (isinstance(a, float) or isinstance(b, float)):
        with np.errstate(over="ignore"):
            return bool(np.float32(a) == np.float32(b))
    return bool(a == b)


def _with_head_dim(model: Mapping[str, Any]) -> dict[str, Any]:
    """The settings with the default of ``kv_channels`` written out, so that spelling it out is no difference."""
    values = dict(model)
    if values.get("kv_channels") is None and values.get("num_attention_heads"):
        values["kv_channels"] = values.get("hidden_size", 0) // values["num_attention_heads"]
    return values
