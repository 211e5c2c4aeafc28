"""Checks and loads checkpoints of megatron-core's distributed format; nothing but tensors and plain values is unpickled."""

import contextlib
import os
import warnings
from collections.abc import Callable, Iterator, Mapping
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
from megatron.core import dist_checkpointing
from megatron.core.dist_checkpointing.dict_utils import nested_values
from megatron.core.dist_checkpointing.mapping import ShardedObject
from megatron.core.dist_checkpointing.state_dict_utils import load_preprocess
from megatron.core.dist_checkpointing.utils import extract_sharded_base

from megatron_dmc.checkpoint.agreement import gather, on_all_ranks, one_line
from megatron_dmc.checkpoint.folder import CheckpointError, CheckpointInfo, read_info, read_json
from megatron_dmc.checkpoint.metadata import UnsafeMetadataError, bytes_per_file, read_metadata, sizes
from megatron_dmc.checkpoint.save import BACKENDS, SHARDED_BACKEND

# Settings of recipe.model that may differ between the checkpoint and the run: they do not change what the weights mean.
_FREE_SETTINGS = frozenset({"init_method_std", "max_position_embeddings"})


def check_checkpoint(folder: str | Path) -> CheckpointInfo:
    """Makes sure that a checkpoint is whole and safe to read; loads no tensors. Any one rank may call this.

    Raises:
        CheckpointError: the folder or one of its files is absent, cut short, from a newer version, or would run code.
    """
    return _check(Path(folder))[0]


def _check(folder: Path) -> tuple[CheckpointInfo, dict[str, tuple[int, ...] | None]]:
    """The checkpoint's description, and the global shape (None: not a tensor) of all it holds, by key."""
    if not folder.is_dir():
        raise CheckpointError(f"checkpoint {folder} does not exist")
    info = read_info(folder)
    for name in ("metadata.json", ".metadata", "common.pt"):
        if not (folder / name).is_file():
            raise CheckpointError(f"checkpoint {folder} is not whole: {name} is missing")
    if read_json(folder / "metadata.json") not in (BACKENDS, SHARDED_BACKEND):
        raise CheckpointError(f"{folder / 'metadata.json'} names another checkpoint format than torch_dist, version 1")
    try:
        metadata = read_metadata(folder / ".metadata")
        torch.load(folder / "common.pt", map_location="cpu", weights_only=True)
    except UnsafeMetadataError as error:
        raise CheckpointError(f"{folder / '.metadata'} {error}") from None
    except Exception as error:
        # A damaged zip file raises nearly anything as well.
        raise CheckpointError(f"{folder / 'common.pt'} cannot be read: {one_line(error)}") from error
    for name, needed in sorted(bytes_per_file(metadata).items()):
        path = folder / name
        if not path.is_file():
            raise CheckpointError(f"checkpoint {folder} is not whole: {name} is missing")
        if path.stat().st_size < needed:
            raise CheckpointError(
                f"checkpoint {folder} is not whole: {name} is cut short ({path.stat().st_size} of {needed} bytes)"
            )
    return info, sizes(metadata)


def load_checkpoint(
    folder: str | Path,
    sharded_state_dict: dict[str, Any],
    *,
    expected_model: Mapping[str, Any] | None = None,
    may_be_missing: Callable[[str], bool] | None = None,
) -> dict[str, Any]:
    """Checks a checkpoint and loads what ``sharded_state_dict`` asks for; every rank calls this together.

    Nothing but tensors and plain values is ever unpickled.

    Args:
        folder: the checkpoint.
        sharded_state_dict: as for ``dist_checkpointing.load``; it may ask for less than the checkpoint holds.
        expected_model: the run's ``Recipe.to_dict()["model"]``: every setting that changes what the weights mean must
            be the checkpoint's own.
        may_be_missing: tells by its checkpoint key whether a tensor may be absent there; the result lacks it too.

    Returns:
        The loaded state dict, with the checkpoint's plain values.

    Raises:
        CheckpointError: on all ranks; as :func:`check_checkpoint`, or the checkpoint is another model's.
    """
    folder = Path(folder)
    what = f"cannot load {folder}"
    checked: tuple[CheckpointInfo, dict[str, tuple[int, ...] | None]] | None = None
    with on_all_ranks(what):
        if dist.get_rank() == 0:
            checked = _check(folder)
    info, stored = next(entry for entry in gather(checked) if entry is not None)
    with on_all_ranks(what):
        _must_fit(folder, info, stored, sharded_state_dict, expected_model, may_be_missing)
    with on_all_ranks(what), _weights_only(), warnings.catch_warnings():
        # megatron-core calls a deprecated name of torch's.
        warnings.simplefilter("ignore", FutureWarning)
        # What is absent has been looked at above; without may_be_missing there is nothing left to ignore.
        state_dict = dist_checkpointing.load(
            sharded_state_dict, str(folder), strict="ignore_all" if may_be_missing else "assume_ok_unexpected"
        )
    return state_dict


def _must_fit(
    folder: Path,
    info: CheckpointInfo,
    stored: dict[str, tuple[int, ...] | None],
    sharded_state_dict: dict[str, Any],
    expected_model: Mapping[str, Any] | None,
    may_be_missing: Callable[[str], bool] | None,
) -> None:
    differences = _model_differences(info.recipe["model"], expected_model) if expected_model else []
    if not differences:
        wanted, _ = extract_sharded_base(load_preprocess(sharded_state_dict)[0])
        for entry in nested_values(wanted):
            key = entry.unique_key if isinstance(entry, ShardedObject) else entry.key
            if key not in stored:
                if may_be_missing is None or not may_be_missing(key):
                    differences.append(f"{key} is missing in the checkpoint")
                continue
            shape = stored[key]
            if isinstance(entry, ShardedObject) or entry.allow_shape_mismatch:
                continue
            if shape is None or tuple(shape) != tuple(entry.global_shape):
                differences.append(f"{key} has shape {shape and list(shape)} there, {list(entry.global_shape)} here")
    if differences:
        more = f" (and {len(differences) - 3} more)" if len(differences) > 3 else ""
        raise CheckpointError(f"checkpoint {folder} is another model's: {'; '.join(differences[:3])}{more}")


def _model_differences(saved: Mapping[str, Any], expected: Mapping[str, Any]) -> list[str]:
    saved, expected = _with_head_dim(saved), _with_head_dim(expected)
    return [
        f"model.{name} is {saved.get(name)!r} there, {expected.get(name)!r} here"
        for name in sorted({*saved, *expected} - _FREE_SETTINGS)
        if saved.get(name) != expected.get(name)
    ]


def _with_head_dim(model: Mapping[str, Any]) -> dict[str, Any]:
    """The settings with the default of ``kv_channels`` written out, so that spelling it out is no difference."""
    values = dict(model)
    if values.get("kv_channels") is None and values.get("num_attention_heads"):
        values["kv_channels"] = values.get("hidden_size", 0) // values["num_attention_heads"]
    return values


@contextlib.contextmanager
def _weights_only() -> Iterator[None]:
    """``torch.load`` takes tensors and plain values only, even where a caller inside torch asks for more.

    torch.distributed.checkpoint's planner asks for ``weights_only=False``; this is torch's own way to forbid it.
    """
    forced = {"TORCH_FORCE_WEIGHTS_ONLY_LOAD": "1", "TORCH_FORCE_NO_WEIGHTS_ONLY_LOAD": None}
    before = {name: os.environ.get(name) for name in forced}
    _set_environment(forced)
    try:
        yield
    finally:
        _set_environment(before)


def _set_environment(values: Mapping[str, str | None]) -> None:
    for name, value in values.items():
        if value is None:
            os.environ.pop(name, None)
        else:
            os.environ[name] = value
