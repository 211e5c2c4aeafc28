"""Every setting of a recipe, by the types of the sections."""

from collections.abc import Iterator
from dataclasses import is_dataclass
from typing import get_args, get_type_hints

from megatron_dmc.recipe import Recipe

# A small recipe in which every section takes effect.
EVERYTHING = """
model:
  {num_layers: 2, hidden_size: 64, ffn_hidden_size: 96, num_attention_heads: 4, num_query_groups: 4, vocab_size: 128,
   max_position_embeddings: 256}
dmc: {local_window: 16}
data: {train: [train], tokenizer: tokenizer, cache: cache, sequence_length: 128}
phases: [{kind: compress, steps: 10}, {kind: solidify, steps: 5}]
training: {global_batch_size: 4}
distillation: {weight: 0.5, teacher: teacher}
checkpoint: {directory: run}
"""


def settings_of(*types: type) -> Iterator[tuple[str, type, str]]:
    """The settings of one of these types, a list of it, or that or null: full name, section and field."""
    for place, kind in get_type_hints(Recipe).items():
        section, index = (kind, "") if is_dataclass(kind) else (get_args(kind)[0], ".0")
        for name, hint in get_type_hints(section).items():
            if {*types} & {hint, *get_args(hint)}:
                yield f"{place}{index}.{name}", section, name


def numbers() -> Iterator[tuple[str, type, str]]:
    return settings_of(int, float)
