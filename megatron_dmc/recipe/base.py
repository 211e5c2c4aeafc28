"""The model section that a base checkpoint brings, and when two model sections are the same model's."""

import json
from collections.abc import Mapping
from dataclasses import asdict, replace
from pathlib import Path
from typing import Any

from megatron_dmc.config import ConfigError, is_same_setting
from megatron_dmc.errors import is_too_long_number
from megatron_dmc.files import CHECKPOINT_MARK
from megatron_dmc.model.model_config import ModelConfig
from megatron_dmc.recipe.values import SectionReader, shown

# Settings that may differ between a checkpoint and a run: they do not change what the weights mean.
FREE_SETTINGS = frozenset({"init_method_std", "max_position_embeddings"})
# Megatron pads a vocabulary to a multiple of 128 per tensor-parallel rank. A difference beyond that is another model's.
MOST_ADDED_TOKENS = 1024
# An error gives both values of so many settings that differ, and the names of all.
SHOWN_DIFFERENCES = 3


def has_base(folder: str) -> bool:
    """Whether a base's description is on this machine."""
    return (Path(folder) / CHECKPOINT_MARK).is_file()


def model_of_base(folder: str, typed: Mapping[str, Any]) -> ModelConfig:
    """The model of a base checkpoint, with what the recipe says itself.

    Args:
        folder: ``checkpoint.load_base``.
        typed: the settings of the recipe's model section that the recipe gives, typed.

    Raises:
        ConfigError: ``dmc.json`` is damaged, or the recipe's model is another than the base's.
    """
    path = Path(folder) / CHECKPOINT_MARK
    values, _ = _description(path)
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
        raise ConfigError(
            f"the model section is not that of checkpoint.load_base {folder}: {listed(differences)}; leave the section out "
            "(model=null: it is then taken from the base), or name another base (for a plan, one that is not here will do)"
        )
    return model


def _description(path: Path) -> tuple[dict[str, Any], dict[str, Any]]:
    """What a base's ``dmc.json`` says: its model section, and all.

    The checkpoint as a whole is checked when its weights are loaded. This is all that a recipe needs of it.
    """
    try:
        values = json.loads(path.read_text(encoding="utf-8"))
        return values["recipe"]["model"], values
    except (OSError, ValueError, KeyError, TypeError, RecursionError) as error:
        what = "a number of thousands of digits" if is_too_long_number(error) else f"{type(error).__name__}: {error}"
        raise ConfigError(
            f"checkpoint.load_base: {path} is damaged, it holds no model section ({what}); name another base"
        ) from None


def vocabulary_of_base(folder: str) -> int:
    """Tokens that a base knows, without the rows that pad its embedding; of a recipe that was read with it."""
    model, values = _description(Path(folder) / CHECKPOINT_MARK)
    known = values.get("vocabulary")
    # A damaged one is refused when the weights are loaded.
    return known if type(known) is int and known > 0 else int(model["vocab_size"])


def vocabulary_line(rows: int, of_base: int, exported: int) -> str | None:
    """Says that a run's vocabulary has rows beyond its base's tokens; None: it has none.

    Args:
        rows: ``model.vocab_size``.
        of_base: tokens that the base knows.
        exported: rows that an export will have.
    """
    if rows == of_base:
        return None
    return (
        f"{rows} rows, {rows - of_base} more than the base's {of_base} (each starts as the mean of those); an export has "
        f"{exported}"
    )


def added_tokens(of_base: int, size: int) -> int:
    """By how many tokens a vocabulary pads its base's, as tensor parallelism may need; 0: it does not."""
    return size - of_base if of_base < size < of_base + MOST_ADDED_TOKENS else 0


def model_differences(saved: Mapping[str, Any], mine: Mapping[str, Any]) -> dict[str, str]:
    """What makes two model sections (plain values) two models: of each such setting, by full name, both values in a phrase."""
    saved, mine = _with_head_dim(saved), _with_head_dim(mine)
    return {
        f"model.{name}": f"{shown(saved.get(name))} there, {shown(mine.get(name))} here"
        for name in sorted({*saved, *mine} - FREE_SETTINGS)
        if not is_same_setting(saved.get(name), mine.get(name))
    }


def listed(differences: Mapping[str, str]) -> str:
    """:func:`model_differences` in one line."""
    names = list(differences)
    first, rest = names[:SHOWN_DIFFERENCES], names[SHOWN_DIFFERENCES:]
    also = f"; {', '.join(rest)} differ{'s' if len(rest) == 1 else ''} too" if rest else ""
    return "; ".join(f"{name} is {differences[name]}" for name in first) + also


def _with_head_dim(model: Mapping[str, Any]) -> dict[str, Any]:
    """The settings with the default of ``kv_channels`` written out, so that spelling it out is no difference."""
    values = dict(model)
    if values.get("kv_channels") is None and values.get("num_attention_heads"):
        values["kv_channels"] = values.get("hidden_size", 0) // values["num_attention_heads"]
    return values
