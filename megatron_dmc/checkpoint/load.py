"""Checks and loads checkpoints of megatron-core's distributed format; nothing but tensors and plain values is unpickled."""

import contextlib
import hashlib
import logging
import os
import warnings
from collections.abc import Callable, Iterator, Mapping
from pathlib import Path
from typing import Any, NamedTuple

import torch
from megatron.core import dist_checkpointing
from megatron.core.dist_checkpointing.dict_utils import extract_matching_values, nested_values
from megatron.core.dist_checkpointing.mapping import ShardedObject, ShardedTensor
from megatron.core.dist_checkpointing.state_dict_utils import load_preprocess
from megatron.core.dist_checkpointing.utils import extract_sharded_base

from megatron_dmc.checkpoint.agreement import on_all_ranks, one_line
from megatron_dmc.checkpoint.folder import CheckpointError, CheckpointInfo, must_be_readable, read_info, read_json
from megatron_dmc.checkpoint.metadata import Entry, UnsafeMetadataError, bytes_per_file, entries, read_metadata
from megatron_dmc.checkpoint.save import BACKENDS, SHARDED_BACKEND
from megatron_dmc.recipe.base import listed, model_differences


class Stored(NamedTuple):
    """A checkpoint's files, which are whole and safe to read.

    Attributes:
        info: what it says of itself.
        entries: what it holds, by key.
        metadata_digest: SHA-256 of ``.metadata``: torch unpickles that file again, so it must still be the one checked.
    """

    info: CheckpointInfo
    entries: dict[str, Entry]
    metadata_digest: str


def check_files(folder: Path) -> Stored:
    """Makes sure that a checkpoint is whole and safe to read; loads no tensors. Any one rank may call this.

    Raises:
        CheckpointError: the folder or one of its files is absent, cut short, from a newer version, or would run code.
    """
    info = read_info(folder)
    for name in ("metadata.json", ".metadata", "common.pt"):
        must_be_readable(folder / name)
    if read_json(folder / "metadata.json") not in (BACKENDS, SHARDED_BACKEND):
        raise CheckpointError(f"{folder / 'metadata.json'} names another checkpoint format than torch_dist, version 1")
    data = (folder / ".metadata").read_bytes()
    try:
        metadata = read_metadata(data)
        torch.load(folder / "common.pt", map_location="cpu", weights_only=True)
    except UnsafeMetadataError as error:
        raise CheckpointError(f"{folder / '.metadata'} {error}") from None
    except Exception as error:
        # A damaged zip file raises nearly anything as well.
        raise CheckpointError(f"{folder / 'common.pt'} cannot be read: {one_line(error)}") from error
    for name, needed in sorted(bytes_per_file(metadata).items()):
        path = folder / name
        must_be_readable(path)
        if path.stat().st_size < needed:
            raise CheckpointError(
                f"checkpoint {folder} is not whole: {name} is cut short ({path.stat().st_size} of {needed} bytes)"
            )
    return Stored(info, entries(metadata), hashlib.sha256(data).hexdigest())


def load_tensors(
    folder: Path,
    stored: Stored,
    sharded_state_dict: dict[str, Any],
    *,
    expected_model: Mapping[str, Any] | None = None,
    may_be_missing: Callable[[str], bool] | None = None,
    in_parts: bool = False,
) -> dict[str, Any]:
    """Loads what ``sharded_state_dict`` asks for from a checkpoint that was checked; see ``SavedModel.load``."""
    what = f"cannot load {folder}"
    with on_all_ranks(what):
        must_fit(folder, stored, sharded_state_dict, expected_model, may_be_missing)
        if hashlib.sha256((folder / ".metadata").read_bytes()).hexdigest() != stored.metadata_digest:
            raise CheckpointError(f"{folder / '.metadata'} has changed since it was checked; start again")
    with on_all_ranks(what), _weights_only(), warnings.catch_warnings():
        # megatron-core calls a deprecated name of torch's.
        warnings.simplefilter("ignore", FutureWarning)
        # What is absent has been looked at above. megatron-core's own way to leave it out fails on torch 2.15.
        _, present = extract_matching_values(
            sharded_state_dict,
            lambda entry: isinstance(entry, ShardedTensor | ShardedObject) and _key(entry) not in stored.entries,
        )
        with _without_deprecations():
            state_dict: dict[str, Any] = dist_checkpointing.load(
                present, str(folder), strict="assume_ok_unexpected", validate_access_integrity=not in_parts
            )
    # Every rank reads the same file.
    absent = next(_absent_values(sharded_state_dict, state_dict), None)
    if absent is not None:
        raise CheckpointError(f"checkpoint {folder} is damaged: common.pt has no {absent}")
    return state_dict


def _absent_values(wanted: Mapping[Any, Any], found: Any, place: str = "") -> Iterator[str]:
    """The names of plain values that were asked for and are not there."""
    for name, value in wanted.items():
        inside = isinstance(found, Mapping) and name in found
        if isinstance(value, Mapping):
            yield from _absent_values(value, found[name] if inside else {}, f"{place}{name}.")
        elif isinstance(value, int | float | str) and not inside:
            yield f"{place}{name}"


def _key(entry: ShardedTensor | ShardedObject) -> str:
    """The name of an entry in a checkpoint."""
    return entry.unique_key if isinstance(entry, ShardedObject) else entry.key


@contextlib.contextmanager
def _without_deprecations() -> Iterator[None]:
    """megatron-core 0.19 calls a function of its own that it has deprecated, and tells the user at every load."""

    def keep(record: logging.LogRecord) -> bool:
        return "is deprecated" not in record.getMessage()

    log = logging.getLogger("megatron.core.dist_checkpointing.strategies.common")
    log.addFilter(keep)
    try:
        yield
    finally:
        log.removeFilter(keep)


def must_fit(
    folder: Path,
    stored: Stored,
    sharded_state_dict: dict[str, Any],
    expected_model: Mapping[str, Any] | None,
    may_be_missing: Callable[[str], bool] | None,
) -> None:
    """Raises CheckpointError unless a checkpoint has what is asked for, of the same shapes, by what its metadata says."""
    settings = model_differences(stored.info.recipe["model"], expected_model) if expected_model else {}
    if settings:
        raise CheckpointError(f"checkpoint {folder} is another model's: {listed(settings)}")
    differences = []
    wanted, _ = extract_sharded_base(load_preprocess(sharded_state_dict)[0])
    for entry in nested_values(wanted):
        key = _key(entry)
        if key not in stored.entries:
            if may_be_missing is None or not may_be_missing(key):
                differences.append(f"{key} is missing in the checkpoint")
            continue
        shape = stored.entries[key].shape
        if isinstance(entry, ShardedObject) or entry.allow_shape_mismatch:
            continue
        if shape is None or tuple(shape) != tuple(entry.global_shape):
            differences.append(f"{key} has shape {shape and list(shape)} there, {list(entry.global_shape)} here")
    if differences:
        more = f" (and {len(differences) - 3} more)" if len(differences) > 3 else ""
        raise CheckpointError(f"checkpoint {folder} is another model's: {'; '.join(differences[:3])}{more}")


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
