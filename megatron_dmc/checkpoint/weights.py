"""Names of a model's weights: which are whose, and how a state dict goes into and out of the model."""

from collections.abc import Callable, Sequence
from typing import Any

import torch

from megatron_dmc.model.decision_projection import is_buffer


def model_state(model_chunks: Sequence[torch.nn.Module]) -> dict[str, Any]:
    """The model's sharded state dict; tensors are named globally, whatever the layout."""
    parts = [
        {name: value for name, value in without_wrapper(chunk).sharded_state_dict().items() if not is_extra(name)}
        for chunk in model_chunks
    ]
    return {"model": parts[0]} if len(parts) == 1 else {f"model{i}": part for i, part in enumerate(parts)}


def set_model_state(
    model_chunks: Sequence[torch.nn.Module], state: dict[str, Any], may_be_missing: Callable[[str], bool] | None = None
) -> None:
    """Puts a loaded state dict into the model; raises RuntimeError if a weight is missing that may not be."""
    for i, chunk in enumerate(model_chunks):
        part = state["model" if len(model_chunks) == 1 else f"model{i}"]
        found = without_wrapper(chunk).load_state_dict(part, strict=False)
        lost = [
            name for name in found.missing_keys if not (is_extra(name) or (may_be_missing and may_be_missing(name)))
        ]
        if lost or found.unexpected_keys:
            raise RuntimeError(f"weights do not fit: missing {lost}, unexpected {found.unexpected_keys}")


def is_extra(name: str) -> bool:
    """Whether it is what Transformer Engine's layers remember beside their weights: the history of FP8 scales.

    Here FP8 has none (see megatron_config), layers of other makes know nothing of it, and Transformer Engine unpickles it.
    """
    return name.endswith("_extra_state")


def only_decisions(state: dict[str, Any]) -> dict[str, Any]:
    """What an adapter learns of a :func:`model_state`."""
    return {chunk: {name: value for name, value in part.items() if is_decision(name)} for chunk, part in state.items()}


def is_decision(name: str) -> bool:
    """Whether a parameter belongs to the decisions' projection."""
    return ".decision." in name


def is_base_weight(name: str) -> bool:
    return not is_decision(name)


def adapter_may_lack(name: str) -> bool:
    """Whether an adapter's checkpoint may be without it: its base's weights, and what older versions did not have."""
    return is_base_weight(name) or is_buffer(name)


def without_wrapper(chunk: Any) -> Any:
    """The module inside megatron-core's DistributedDataParallel and Float16Module, if any."""
    while hasattr(chunk, "module"):
        chunk = chunk.module
    return chunk
