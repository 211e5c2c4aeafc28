"""Named tensors: those of checkpoints and of Hugging Face folders, and whether two sets are the same."""

from collections.abc import Mapping
from pathlib import Path

import torch
from megatron.core.dist_checkpointing import load_plain_tensors
from torch import Tensor

from megatron_dmc.convert.weights import Weights


def assert_same_tensors(actual: Mapping[str, Tensor], expected: Mapping[str, Tensor]) -> None:
    """The same names, and under each the same dtype, shape and values, to the last bit."""
    assert actual.keys() == expected.keys()
    different = [
        name
        for name, tensor in expected.items()
        if actual[name].dtype != tensor.dtype or not torch.equal(actual[name], tensor)
    ]
    assert not different, f"differ: {different}"


def checkpoint_tensors(folder: Path) -> dict[str, Tensor]:
    """All of a checkpoint's, put together from their shards: weights, main parameters, moments."""
    return {name: value for name, value in load_plain_tensors(str(folder)).items() if isinstance(value, Tensor)}


def hugging_face_tensors(folder: Path) -> dict[str, Tensor]:
    """All of a Hugging Face folder's, under Hugging Face's names."""
    weights = Weights(folder)
    return {name: weights[name] for name in weights.shapes}
