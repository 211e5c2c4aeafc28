"""A model's parameters -> a checkpoint, one in memory at a time."""

from collections.abc import Callable
from dataclasses import replace
from pathlib import Path

import torch
from torch import Tensor

from megatron_dmc.checkpoint import CheckpointInfo, SavedModel
from megatron_dmc.checkpoint.save import save_on_demand
from megatron_dmc.checkpoint.vocabulary import fill_rows, has_row_per_token
from megatron_dmc.checkpoint.weights import model_state
from megatron_dmc.checkpoint.writer import OnDemand
from megatron_dmc.config import ConfigError, DMCConfig
from megatron_dmc.convert.mapping import rows
from megatron_dmc.convert.progress import Written, progress
from megatron_dmc.convert.rows import Row
from megatron_dmc.convert.single_process import shapes_only
from megatron_dmc.model.decision_projection import is_buffer
from megatron_dmc.model.model_config import ModelConfig
from megatron_dmc.recipe import CheckpointConfig, DataConfig, PhaseConfig, Recipe, TrainingConfig
from megatron_dmc.recipe.base import MOST_ADDED_TOKENS


def check_multiple(pad_vocab_to_multiple_of: int) -> None:
    """Raises ConfigError unless it is from 1 to MOST_ADDED_TOKENS."""
    if not 1 <= pad_vocab_to_multiple_of <= MOST_ADDED_TOKENS:
        raise ConfigError(
            f"pad_vocab_to_multiple_of must be from 1 to {MOST_ADDED_TOKENS}, got {pad_vocab_to_multiple_of}"
        )


def write_model(
    folder: Path,
    parameter: Callable[[Row], Tensor],
    model: ModelConfig,
    dmc: DMCConfig | None,
    *,
    dtype: torch.dtype,
    pad_vocab_to_multiple_of: int,
) -> Written:
    """Writes a weights-only checkpoint's files into an empty folder, in a world of this one process.

    Memory: the largest parameter twice.

    Args:
        parameter: a row of the mapping -> its megatron-core parameter, on the CPU and finite. Asked in the order of the
            checkpoint's file.
        model: sizes of what ``parameter`` gives.
        dtype: to write.
        pad_vocab_to_multiple_of: as :func:`import_hf`'s.

    Raises:
        ConfigError: what ``parameter`` raises.
        CheckpointError: the checkpoint cannot be written.
    """
    vocabulary = model.vocab_size
    padding = -vocabulary % pad_vocab_to_multiple_of
    padded = replace(model, vocab_size=vocabulary + padding)
    row_of = {row.megatron: row for row in rows(model, dmc)}
    network = shapes_only(padded, dmc, dtype)
    state = model_state([network])["model"]
    if lost := [name for name in state if name not in row_of and not is_buffer(name)]:
        raise RuntimeError(f"the mapping has no row for {', '.join(lost)}")

    buffers = {name: _fresh_buffer(name, entry.data) for name, entry in state.items() if is_buffer(name)}

    def make(name: str) -> Tensor:
        if name in buffers:
            return buffers[name]
        value = parameter(row_of[name]).to(dtype)
        return _padded(value, vocabulary, padding) if padding and has_row_per_token(name) else value

    recipe = placeholder_recipe(padded, dmc)
    info = CheckpointInfo(
        kind="weights",
        recipe=recipe.to_dict(),
        step=0,
        consumed_samples=0,
        phase=0,
        compression_ratio=None,
        vocabulary=vocabulary if padding else None,
    )
    written = Written(len(state), sum(entry.data.nbytes for entry in state.values()))
    with progress("writing the checkpoint", written.bytes) as advance:
        save_on_demand(folder, "checkpoint", {"model": state}, info, OnDemand(state, make, advance))
    for path in (folder / "checkpoint").iterdir():
        path.rename(folder / path.name)
    (folder / "checkpoint").rmdir()
    # Reads the files' metadata, and compares their sizes.
    SavedModel.open(folder).check_holds(model_state([network]), expected_model=recipe.to_dict()["model"])
    return written


def _padded(value: Tensor, vocabulary: int, padding: int) -> Tensor:
    whole = torch.empty(vocabulary + padding, *value.shape[1:], dtype=value.dtype)
    whole[:vocabulary] = value
    fill_rows(whole, vocabulary)
    return whole


def _fresh_buffer(name: str, like: Tensor) -> Tensor:
    """What a decision projection has beside its weights, where those are a model's own: a scale of 1 and no offset."""
    value = 1 if name.endswith(".input_scale") else 0
    return torch.full(like.shape, value, dtype=like.dtype)


def placeholder_recipe(model: ModelConfig, dmc: DMCConfig | None) -> Recipe:
    """What a checkpoint tells of its run, where there was none: the model is real, one phase says whether it merges."""
    return Recipe(
        model=model,
        dmc=dmc or DMCConfig(),
        data=DataConfig(train=["none"], tokenizer="none", sequence_length=model.max_position_embeddings, cache="none"),
        phases=[PhaseConfig(kind="pretrain" if dmc is None else "compress", steps=1)],
        training=TrainingConfig(global_batch_size=1),
        checkpoint=CheckpointConfig(directory="none"),
    )
