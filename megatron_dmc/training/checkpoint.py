"""Checkpoints that are whole or absent: megatron-core's distributed format, written aside, checked before it is read.

A checkpoint is a folder ``root/name`` with the files of ``megatron.core.dist_checkpointing`` (``metadata.json``,
``.metadata``, ``common.pt``, ``*.distcp``), ``dmc.json`` (:class:`CheckpointInfo`) and, if given, ``tokenizer/``. It is
written as ``root/.name.tmp-*`` and renamed when every file is on the disk. ``root/latest`` names the newest full one.

The data is written by torch's own ``FileSystemWriter`` in the calling process. ``dist_checkpointing.save`` spawns a
manager and a process per file instead: 5 seconds for the first save, a ``__main__`` guard in every script, and rank 0's
own failures (``common.pt`` on a full disk) leave the others waiting. The files are the same: ``dist_checkpointing.load``
reads them.
"""

import contextlib
import errno
import io
import json
import os
import pickle
import re
import secrets
import shutil
import socket
import warnings
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import asdict
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
from megatron.core import dist_checkpointing
from megatron.core.dist_checkpointing.core import CheckpointingConfig, save_config
from megatron.core.dist_checkpointing.dict_utils import nested_values
from megatron.core.dist_checkpointing.mapping import ShardedObject, is_main_replica
from megatron.core.dist_checkpointing.state_dict_utils import load_preprocess, save_preprocess
from megatron.core.dist_checkpointing.strategies.torch import (
    MCoreSavePlanner,
    _replace_state_dict_keys_with_sharded_keys,
    mcore_to_pyt_state_dict,
)
from megatron.core.dist_checkpointing.utils import extract_sharded_base
from torch.distributed.checkpoint import CheckpointException, FileSystemWriter, SavePlan, SavePlanner
from torch.distributed.checkpoint import save as torch_save

from megatron_dmc.training.checkpoint_folder import (
    FORMAT_VERSION,
    CheckpointError,
    CheckpointInfo,
    flush_to_disk,
    prune,
    put_in_place,
    read_info,
    read_json,
    read_latest,
    remove_leftovers,
    update_latest,
)
from megatron_dmc.training.checkpoint_metadata import UnsafeMetadataError, bytes_per_file, read_metadata, sizes

__all__ = [
    "CheckpointError",
    "CheckpointInfo",
    "check_checkpoint",
    "copy_tokenizer",
    "load_checkpoint",
    "prepare_optimizer_for_load",
    "prune",
    "publish",
    "read_latest",
    "restore_adam_steps",
    "save_checkpoint",
    "update_latest",
]

# metadata.json of every checkpoint written here: the backends that dist_checkpointing.load is to use.
_BACKENDS = CheckpointingConfig("torch_dist", 1)
# A tokenizer is often given as a whole model folder: the weights beside it are not copied. generation_config.json belongs
# to it: its end-of-text tokens can be more than the tokenizer's one.
TOKENIZER_FILES = (
    *("tokenizer.json", "tokenizer_config.json", "special_tokens_map.json", "added_tokens.json"),
    *("tokenizer.model", "vocab.json", "merges.txt", "chat_template.jinja", "chat_template.json"),
    "generation_config.json",
)
# Settings of recipe.model that may differ between the checkpoint and the run: they do not change what the weights mean.
_FREE_SETTINGS = frozenset({"init_method_std", "max_position_embeddings"})


def save_checkpoint(
    root: str | Path,
    name: str,
    sharded_state_dict: dict[str, Any],
    info: CheckpointInfo,
    tokenizer_folder: str | Path | None = None,
) -> Path:
    """Writes ``root/name``; every rank of the default process group calls this together.

    An existing ``root/name`` is replaced only when the new one is whole. What a killed run left behind in ``root`` is
    removed. ``latest`` is not touched (:func:`update_latest`).

    Args:
        root: on storage that all nodes share; made if absent.
        name: a plain folder name, such as ``step_00000600``.
        sharded_state_dict: as for ``dist_checkpointing.save``: sharded tensors and objects, and plain values that are
            the same on all ranks. Factories in it are applied in place.
        info: written as ``dmc.json``.
        tokenizer_folder: its tokenizer files are copied to ``tokenizer/``.

    Returns:
        The checkpoint's folder.

    Raises:
        CheckpointError: on all ranks, if anything failed on any (a full disk, say). The temporary folder is removed,
            and whatever was in ``root`` before is as it was.
    """
    folder = Path(root) / name
    if not name or Path(name).name != name or name.startswith("."):
        raise CheckpointError(f"cannot save a checkpoint named {name!r}; it must be a plain folder name")
    # A name that no earlier process can still be writing into.
    temporary = folder.with_name(f".{name}.tmp-{_gather(secrets.token_hex(4))[0]}")
    try:
        _write(temporary, folder, sharded_state_dict, info, tokenizer_folder)
        with _on_all_ranks(f"cannot save {folder}"):
            if dist.get_rank() == 0:
                put_in_place(temporary, folder)
    except CheckpointError:
        if dist.get_rank() == 0:
            shutil.rmtree(temporary, ignore_errors=True)
        raise
    return folder


def _write(
    temporary: Path,
    folder: Path,
    sharded_state_dict: dict[str, Any],
    info: CheckpointInfo,
    tokenizer_folder: str | Path | None,
) -> None:
    """All of a checkpoint's files, in ``temporary``. Each block below is one thing that can fail on some ranks only."""
    what = f"cannot save {folder}"
    is_first = dist.get_rank() == 0
    with _on_all_ranks(what):
        if is_first:
            folder.parent.mkdir(parents=True, exist_ok=True)
            remove_leftovers(folder.parent)
            temporary.mkdir()
    with _on_all_ranks(what):
        if not temporary.is_dir():
            raise CheckpointError(
                f"{what}: rank {dist.get_rank()} on {socket.gethostname()} does not see {temporary.name}, which rank 0 "
                "made; the folder must be on storage that all nodes share"
            )
        sharded, common = save_preprocess(sharded_state_dict)
        by_key, _, _ = _replace_state_dict_keys_with_sharded_keys(sharded, keep_only_main_replica=True)
        values = mcore_to_pyt_state_dict(by_key)
        for key, value in values.items():
            if isinstance(value, io.BytesIO):
                _must_be_loadable(value, key)
    needed = sum(_gather(_tensor_bytes(sharded)))
    with _on_all_ranks(what, needed, folder.parent):
        if is_first:
            _must_have_space(folder.parent, needed, what)
            buffer = io.BytesIO()
            torch.save(common, buffer)
            _must_be_loadable(buffer, "the plain values of the state")
            (temporary / "common.pt").write_bytes(buffer.getbuffer())
    with _on_all_ranks(what, needed, folder.parent):
        torch_save(
            values,
            storage_writer=_Writer(temporary, thread_count=1),
            planner=MCoreSavePlanner(dedup_replicated_tensors=False, flatten_state_dict=False),
        )
    with _on_all_ranks(what, needed, folder.parent):
        if is_first:
            save_config(_BACKENDS, str(temporary))
            if tokenizer_folder is not None:
                if not Path(tokenizer_folder, "tokenizer.json").is_file():
                    raise CheckpointError(
                        f"the tokenizer {tokenizer_folder} has no tokenizer.json, so the checkpoint cannot be completed"
                    )
                copy_tokenizer(Path(tokenizer_folder), temporary / "tokenizer")
            text = json.dumps({"format_version": FORMAT_VERSION, **asdict(info)}, indent=2)
            (temporary / "dmc.json").write_text(text + "\n", encoding="utf-8")
            for path in (*temporary.rglob("*"), temporary):
                flush_to_disk(path)


class _Writer(FileSystemWriter):
    def storage_meta(self) -> None:
        """Nothing: torch would record the path of the temporary folder, which is gone a moment later."""

    def write_data(self, plan: SavePlan, planner: SavePlanner) -> Any:
        """Writes this rank's file; a full disk is an OSError, Ctrl-C a KeyboardInterrupt.

        torch's zip writer stumbles over the unfinished file while it handles either and raises a RuntimeError about
        positions. What came first is all that the other ranks are to be told.
        """
        try:
            return super().write_data(plan, planner)
        except RuntimeError as error:
            first: BaseException | None = error
            while first is not None and not isinstance(first, (OSError, KeyboardInterrupt)):
                first = first.__context__
            raise first or error from None


def _tensor_bytes(sharded: dict[str, Any]) -> int:
    """Bytes of the tensors that this rank writes."""
    return sum(
        entry.data.nbytes
        for entry in nested_values(sharded)
        if not isinstance(entry, ShardedObject) and is_main_replica(entry.replica_id)
    )


def _must_be_loadable(buffer: io.BytesIO, what: str) -> None:
    """Refuses at once what the weights-only loader would refuse when the run is resumed."""
    buffer.seek(0)
    try:
        torch.load(buffer, weights_only=True)
    except pickle.UnpicklingError as error:
        raise CheckpointError(f"cannot save {what}: {_one_line(error)}; save plain values and tensors only") from None


def _must_have_space(root: Path, needed: int, what: str) -> None:
    space = shutil.disk_usage(root)
    # Some network file systems report no size at all.
    if space.total > 0 and space.free < needed:
        raise CheckpointError(
            f"{what}: it needs {_size(needed)} and {_size(space.free)} are free; nothing was written, "
            "earlier checkpoints are untouched"
        )


def copy_tokenizer(source: Path, target: Path) -> None:
    """Copies what belongs to the tokenizer, as far as it is there."""
    for name in TOKENIZER_FILES:
        if (source / name).is_file():
            target.mkdir(exist_ok=True)
            shutil.copyfile(source / name, target / name)


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
    if read_json(folder / "metadata.json") != asdict(_BACKENDS):
        raise CheckpointError(f"{folder / 'metadata.json'} names another checkpoint format than torch_dist, version 1")
    try:
        metadata = read_metadata(folder / ".metadata")
        torch.load(folder / "common.pt", map_location="cpu", weights_only=True)
    except UnsafeMetadataError as error:
        raise CheckpointError(f"{folder / '.metadata'} {error}") from None
    except Exception as error:
        # A damaged zip file raises nearly anything as well.
        raise CheckpointError(f"{folder / 'common.pt'} cannot be read: {_one_line(error)}") from error
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
    with _on_all_ranks(what):
        if dist.get_rank() == 0:
            checked = _check(folder)
    info, stored = next(entry for entry in _gather(checked) if entry is not None)
    with _on_all_ranks(what):
        _must_fit(folder, info, stored, sharded_state_dict, expected_model, may_be_missing)
    with _on_all_ranks(what), _weights_only(), warnings.catch_warnings():
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


def publish(root: str | Path, name: str, keep_last: int) -> None:
    """Moves ``latest`` to a saved full checkpoint and prunes older ones; every rank calls this together.

    Raises:
        CheckpointError: on all ranks, if rank 0 could not.
    """
    with _on_all_ranks(f"cannot make {Path(root) / name} the latest checkpoint"):
        if dist.get_rank() == 0:
            update_latest(root, name)
            prune(root, keep_last)


def prepare_optimizer_for_load(optimizer: Any) -> None:
    """Gives a fresh distributed optimizer the state that loading fills in; call it before its ``sharded_state_dict``.

    Without Transformer Engine or Apex the optimizer is torch's AdamW, whose state is empty until its first step, and
    the ``dp_reshardable`` format needs the tensors to be there.
    """
    for part in _parts(optimizer):
        if hasattr(part, "_init_optimizer_states_with_dummy_values"):
            part._init_optimizer_states_with_dummy_values()


def restore_adam_steps(optimizer: Any) -> None:
    """Sets torch AdamW's step counts from the loaded parameter groups; call it after ``optimizer.load_state_dict``.

    megatron-core's distributed optimizer keeps one step count per group (as fused Adams do). torch's AdamW keeps one
    per parameter, and would go on from that of :func:`prepare_optimizer_for_load`: the bias correction, and so the
    resumed run, would be silently wrong.
    """
    for part in _parts(optimizer):
        for group in part.optimizer.param_groups:
            for parameter in group["params"]:
                state = part.optimizer.state.get(parameter, {})
                if "step" in group and "step" in state:
                    state["step"] = torch.full_like(torch.as_tensor(state["step"]), float(group["step"]))


def _parts(optimizer: Any) -> Sequence[Any]:
    return getattr(optimizer, "chained_optimizers", [optimizer])


@contextlib.contextmanager
def _on_all_ranks(what: str, needed: int | None = None, root: Path | None = None) -> Iterator[None]:
    """If the block fails on any rank, raises the same CheckpointError on all: no rank waits for another forever.

    ``needed`` bytes below ``root`` are named when the reason is a full disk.
    """
    message: str | None = None
    cause: BaseException | None = None
    try:
        yield
    except CheckpointError as error:
        message, cause = str(error), error.__cause__
    # torch's CheckpointException, which carries the failures of all ranks, is not an Exception.
    except (Exception, CheckpointException) as error:
        message, cause = f"{what}: {_one_line(error)}", error
        if needed is not None and root is not None and _is_full_disk(error):
            with contextlib.suppress(OSError):
                message += f" ({_size(needed)} needed, {_size(shutil.disk_usage(root).free)} free)"
            message += "; earlier checkpoints are untouched"
    first = next((error for error in _gather(message) if error is not None), None)
    if first is not None:
        raise CheckpointError(first) from cause


def _gather(value: Any) -> list[Any]:
    """``value`` of every rank, in the order of the ranks."""
    values: list[Any] = [None] * dist.get_world_size()
    dist.all_gather_object(values, value)
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


def _root_cause(error: BaseException) -> BaseException:
    """The exception of the rank that failed, out of the summary that torch.distributed.checkpoint makes."""
    if isinstance(error, CheckpointException) and error.failures:
        return _root_cause(next(iter(error.failures.values()))[0])
    return error


def _is_full_disk(error: BaseException) -> bool:
    error = _root_cause(error)
    return isinstance(error, OSError) and error.errno in (errno.ENOSPC, errno.EDQUOT, errno.EFBIG)


def _one_line(error: BaseException) -> str:
    error = _root_cause(error)
    text = str(error).strip()
    if isinstance(error, pickle.UnpicklingError):
        # torch's message is a page of advice on how to load it all the same.
        named = re.search(r"GLOBAL ([\w.]+)", text)
        return f"it holds {named[1] if named else 'something'}, which is neither a tensor nor a plain value"
    if isinstance(error, OSError) and error.strerror:
        return f"{error.strerror}: {error.filename}" if error.filename else error.strerror
    return f"{type(error).__name__}: {text.splitlines()[0]}" if text else type(error).__name__


def _size(count: int) -> str:
    for unit, factor in (("GB", 10**9), ("MB", 10**6), ("kB", 10**3)):
        if count >= factor:
            return f"{count / factor:.1f} {unit}"
    return f"{count} bytes"
