"""The weights of a saved model one after the other, for whoever has not the memory for all of them."""

from collections.abc import Iterable, Iterator
from dataclasses import replace
from typing import Any

import torch
from megatron.core.dist_checkpointing.dict_utils import nested_values
from megatron.core.dist_checkpointing.mapping import ShardedTensor, ShardedTensorFactory
from torch import Tensor

from megatron_dmc.checkpoint.saved_model import SavedModel
from megatron_dmc.checkpoint.vocabulary import fill_rows, has_row_per_token
from megatron_dmc.checkpoint.weights import adapter_may_lack, is_decision, model_state, only_decisions, set_model_state
from megatron_dmc.model.decision_projection import DecisionProjection, is_buffer
from megatron_dmc.recipe.base import added_tokens

# Small tensors are loaded together, since every load reads the checkpoint's metadata again.
_BYTES_AT_ONCE = 2**25


def load_decisions(saved: SavedModel, network: torch.nn.Module) -> None:
    """Loads the decision projections, megabytes at most, and nothing else.

    Args:
        network: the whole model on the meta device, in one process; its decision projections are moved to the CPU.

    Raises:
        CheckpointError: they are absent, damaged, or another model's.
    """
    for module in network.modules():
        if isinstance(module, DecisionProjection):
            module.to_empty(device="cpu")
            # Older checkpoints have neither.
            module.input_scale.fill_(1)
            module.offset.zero_()
    wanted = only_decisions(model_state([network]))
    set_model_state([network], saved.load(wanted, may_be_missing=is_buffer), adapter_may_lack)


def weights_in_turn(saved: SavedModel, network: torch.nn.Module, names: Iterable[str]) -> Iterator[tuple[str, Tensor]]:
    """All weights but the decisions', by name, on the CPU, in the dtype in which they are stored; what was given is not kept.

    An adapter's are its base's: it may have been trained in another dtype.

    Memory: the largest weight twice, or 32 MiB.

    Args:
        network: the whole model on the meta device, in one process.
        names: of its parameters, in the order in which they are given.

    Raises:
        CheckpointError, ConfigError: as :meth:`SavedModel.load_into`, when the first weight is asked for, unless data is
            damaged.
    """
    saved.check_fits(saved.recipe)
    holder = saved.base or saved
    holder.check_fits(saved.recipe)
    vocabulary, expected = holder.recipe.model.vocab_size, saved.recipe.to_dict()["model"]
    # A base's vocabulary may have been padded when the run loaded it.
    added = added_tokens(vocabulary, saved.recipe.model.vocab_size)
    expected["vocab_size"] -= added
    state = {name: entry for name, entry in model_state([network])["model"].items() if not is_decision(name)}
    holder.check_holds({"model": state}, expected_model=expected)
    for batch in _batches(names, state):
        loaded = _load(holder, {name: state[name] for name in batch})
        for name in batch:
            if added and has_row_per_token(name):
                fill_rows(loaded[name], vocabulary)
            yield name, loaded.pop(name)


def _batches(names: Iterable[str], state: dict[str, Any]) -> Iterator[list[str]]:
    batch: list[str] = []
    for name in names:
        if batch and sum(state[each].data.nbytes for each in (*batch, name)) > _BYTES_AT_ONCE:
            yield batch
            batch = []
        batch.append(name)
    if batch:
        yield batch


def _load(holder: SavedModel, entries: dict[str, Any]) -> dict[str, Tensor]:
    """The tensors of some entries of a state dict on the meta device, on the CPU, in the holder's dtype."""
    whole = {name: torch.empty_like(entry.data, dtype=holder.dtype, device="cpu") for name, entry in entries.items()}
    parts = {name: _parts(_with_data(entry, whole[name])) for name, entry in entries.items()}
    views = {(name, key): part.data for name, each in parts.items() for key, part in each.items()}
    loaded = holder.load({"model": parts}, in_parts=True)["model"]
    for (name, key), view in views.items():
        value = loaded[name][key]
        # megatron-core reads into what it is given, but does not promise to.
        if view.data_ptr() != value.data_ptr():
            view.copy_(value)
    return whole


def _with_data(entry: ShardedTensor | ShardedTensorFactory, data: Tensor) -> ShardedTensor | ShardedTensorFactory:
    if isinstance(entry, ShardedTensor):
        return replace(entry, data=data, dtype=data.dtype)
    return replace(entry, data=data)


def _parts(entry: ShardedTensor | ShardedTensorFactory) -> dict[str, ShardedTensor]:
    """The tensors that a parameter is stored as, views of its data; each has all the axes of what is stored.

    A layer's tensor is one of a stack. With the stack's axis left for megatron-core to add, torch takes one process for the
    owner of all other layers, too, and refuses to load a part.
    """
    built = entry.build() if isinstance(entry, ShardedTensorFactory) else entry
    found = {}
    for number, part in enumerate(nested_values({"whole": built})):
        data = part.data.view((1,) * part.prepend_axis_num + part.local_shape)
        found[str(number)] = replace(part, data=data, local_shape=tuple(data.shape), prepend_axis_num=0)
    return found
