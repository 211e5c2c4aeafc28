"""Checkpoints that are whole or absent: megatron-core's distributed format, written aside, checked before it is read.

A checkpoint is a folder ``root/name`` with the files of ``megatron.core.dist_checkpointing`` (``metadata.json``,
``.metadata``, ``common.pt``, ``*.distcp``), ``dmc.json`` (:class:`CheckpointInfo`) and, if given, ``tokenizer/``. It is
written as ``root/.name.tmp-*`` and renamed when every file is on the disk. ``root/latest`` names the newest full one.

The data is written by torch's own ``FileSystemWriter`` in the calling process. ``dist_checkpointing.save`` spawns a
manager and a process per file instead: 5 seconds for the first save, a ``__main__`` guard in every script, and a full disk
on one rank leaves the others waiting. The files are the same; ``dist_checkpointing.load`` reads them.
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
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any, Literal

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
from torch.distributed.checkpoint import CheckpointException, FileSystemWriter
from torch.distributed.checkpoint import save as torch_save

from megatron_dmc.training.checkpoint_metadata import UnsafeMetadataError, bytes_per_file, read_metadata, sizes

FORMAT_VERSION = 1
# metadata.json of every checkpoint written here: the backends that dist_checkpointing.load is to use.
_BACKENDS = CheckpointingConfig("torch_dist", 1)
# A tokenizer is often given as a whole model folder: the weights beside it are not copied.
_TOKENIZER_FILES = ("tokenizer.json", "tokenizer_config.json", "special_tokens_map.json", "chat_template.jinja")
# Settings of recipe.model that may differ between the checkpoint and the run: they do not change what the weights mean.
_FREE_SETTINGS = frozenset({"init_method_std", "max_position_embeddings"})


class CheckpointError(RuntimeError):
    """A checkpoint that cannot be written or must not be read. One line: what, where, and why."""


@dataclass(frozen=True)
class CheckpointInfo:
    """``dmc.json``: what a checkpoint holds.

    Attributes:
        kind: ``full`` can be resumed; ``weights`` holds the model only.
        recipe: the run's settings, ``Recipe.to_dict()``.
        step: optimizer steps taken, over all phases.
        consumed_samples: samples taken from the training data, over all phases.
        phase: index into the recipe's phases.
        compression_ratio: noise-free ratio of the last global batch, None where nothing is compressed yet.
    """

    kind: Literal["full", "weights"]
    recipe: dict[str, Any]
    step: int
    consumed_samples: int
    phase: int
    compression_ratio: float | None = None


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
        sharded_state_dict: as for ``dist_checkpointing.save``: sharded tensors and objects, and plain values that are the
            same on all ranks. Factories in it are applied in place.
        info: written as ``dmc.json``.
        tokenizer_folder: its tokenizer files are copied to ``tokenizer/``.

    Returns:
        The checkpoint's folder.

    Raises:
        CheckpointError: on all ranks, if anything failed on any (a full disk, say). The temporary folder is removed, and
            whatever was in ``root`` before is as it was.
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
                _put_in_place(temporary, folder)
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
            _remove_leftovers(folder.parent)
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
                _copy_tokenizer(Path(tokenizer_folder), temporary / "tokenizer")
            text = json.dumps({"format_version": FORMAT_VERSION, **asdict(info)}, indent=2, allow_nan=False)
            (temporary / "dmc.json").write_text(text + "\n", encoding="utf-8")
            for path in (*temporary.rglob("*"), temporary):
                _flush_to_disk(path)


class _Writer(FileSystemWriter):
    def storage_meta(self) -> None:
        """Nothing: torch would record the path of the temporary folder, which is gone a moment later."""


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
        with _weights_only():
            torch.load(buffer)
    except pickle.UnpicklingError as error:
        raise CheckpointError(f"cannot save {what}: {_one_line(error)}; save plain values and tensors only") from None


def _must_have_space(root: Path, needed: int, what: str) -> None:
    space = shutil.disk_usage(root)
    # Some network file systems report no size at all.
    if space.total > 0 and space.free < needed:
        raise CheckpointError(
            f"{what}: it needs {_size(needed)} and {_size(space.free)} are free; nothing was written, earlier checkpoints "
            "are untouched"
        )


def _copy_tokenizer(source: Path, target: Path) -> None:
    if not (source / "tokenizer.json").is_file():
        raise CheckpointError(f"the tokenizer {source} has no tokenizer.json, so the checkpoint cannot be completed")
    target.mkdir()
    for name in _TOKENIZER_FILES:
        if (source / name).is_file():
            shutil.copyfile(source / name, target / name)


def _put_in_place(temporary: Path, folder: Path) -> None:
    old = _aside(folder)
    if folder.exists():
        folder.rename(old)
    temporary.rename(folder)
    _flush_to_disk(folder.parent)
    shutil.rmtree(old, ignore_errors=True)


def _aside(folder: Path) -> Path:
    """Where a checkpoint that is being replaced waits, between two renames."""
    return folder.with_name(f".{folder.name}.old")


def _restore_if_half_replaced(folder: Path) -> None:
    """Undoes a replacement that was killed between its two renames. Several ranks may try at once."""
    if not folder.exists():
        with contextlib.suppress(FileNotFoundError):
            _aside(folder).rename(folder)


def _remove_leftovers(root: Path) -> None:
    for path in root.glob(".*.old"):
        _restore_if_half_replaced(root / path.name[1 : -len(".old")])
        shutil.rmtree(path, ignore_errors=True)
    for path in root.glob(".*.tmp-*"):
        shutil.rmtree(path, ignore_errors=True)


def update_latest(root: str | Path, name: str) -> None:
    """Makes ``root/latest`` name the checkpoint ``name``, in one step; one rank calls this, after the save.

    Raises:
        CheckpointError: ``root/name`` is not a checkpoint, or the disk is full (``latest`` is then as it was).
    """
    root = Path(root)
    if not (root / name / "dmc.json").is_file():
        raise CheckpointError(f"{root / 'latest'} cannot name {name!r}: {root / name} is not a whole checkpoint")
    temporary = root / ".latest.tmp"
    try:
        temporary.write_text(name + "\n", encoding="utf-8")
        _flush_to_disk(temporary)
        temporary.replace(root / "latest")
        _flush_to_disk(root)
    except OSError as error:
        temporary.unlink(missing_ok=True)
        raise CheckpointError(f"cannot write {root / 'latest'}: {_one_line(error)}") from error


def read_latest(root: str | Path) -> str | None:
    """The name of the newest full checkpoint below ``root``, None before the first.

    Raises:
        CheckpointError: ``root/latest`` does not hold the name of a folder.
    """
    path = Path(root) / "latest"
    try:
        name = path.read_text(encoding="utf-8").strip()
    except FileNotFoundError:
        return None
    except (OSError, UnicodeDecodeError) as error:
        raise CheckpointError(f"cannot read {path}: {_one_line(error)}") from error
    if not name or Path(name).name != name or name.startswith("."):
        raise CheckpointError(f"{path} must hold the name of a checkpoint folder beside it, got {name[:80]!r}")
    _restore_if_half_replaced(path.parent / name)
    return name


def prune(root: str | Path, keep_last: int) -> list[str]:
    """Deletes all but the newest ``keep_last`` full checkpoints ``step_*``, and never the one that ``latest`` names.

    Folders that are not whole full checkpoints are left alone. One rank calls this.

    Returns:
        The names that were deleted.
    """
    root = Path(root)
    latest = read_latest(root)
    full = sorted(
        (int(match[1]), path.name)
        for path in root.glob("step_*")
        if (match := re.fullmatch(r"step_(\d+)", path.name)) and _is_whole_and_full(path)
    )
    deleted = [name for _, name in full[: max(0, len(full) - keep_last)] if name != latest]
    for name in deleted:
        # Renamed first: a half deleted folder must not look like a checkpoint.
        gone = root / f".{name}.tmp-deleted"
        shutil.rmtree(gone, ignore_errors=True)
        (root / name).rename(gone)
        shutil.rmtree(gone, ignore_errors=True)
    return deleted


def _is_whole_and_full(folder: Path) -> bool:
    try:
        return _read_info(folder).kind == "full"
    except CheckpointError:
        return False


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
    info = _read_info(folder)
    for name in ("metadata.json", ".metadata", "common.pt"):
        if not (folder / name).is_file():
            raise CheckpointError(f"checkpoint {folder} is not whole: {name} is missing")
    if _read_json(folder / "metadata.json") != asdict(_BACKENDS):
        raise CheckpointError(f"{folder / 'metadata.json'} names another checkpoint format than torch_dist, version 1")
    try:
        metadata = read_metadata(folder / ".metadata")
        with _weights_only():
            torch.load(folder / "common.pt", map_location="cpu")
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


def _read_info(folder: Path) -> CheckpointInfo:
    path = folder / "dmc.json"
    if not path.is_file():
        raise CheckpointError(f"{folder} is not a checkpoint of megatron_dmc, or not whole: dmc.json is missing")
    values = _read_json(path)
    version = values.pop("format_version", None)
    if version != FORMAT_VERSION:
        raise CheckpointError(
            f"{path} has format_version {version!r}, this version of megatron_dmc reads {FORMAT_VERSION}"
        )
    try:
        info = CheckpointInfo(**values)
    except TypeError as error:
        raise CheckpointError(f"{path} is not a checkpoint's description: {_one_line(error)}") from None
    if not isinstance(info.recipe, dict) or not isinstance(info.recipe.get("model"), dict):
        raise CheckpointError(f"{path} holds no recipe of the run that wrote it")
    if info.kind not in ("full", "weights"):
        raise CheckpointError(f"{path} has kind {info.kind!r}, it must be full or weights")
    for field in ("step", "consumed_samples", "phase"):
        value = getattr(info, field)
        if not isinstance(value, int) or isinstance(value, bool) or value < 0:
            raise CheckpointError(f"{path} has {field} {value!r}, it must be an integer >= 0")
    return info


def _read_json(path: Path) -> dict[str, Any]:
    try:
        values = json.loads(path.read_text(encoding="utf-8"))
    except (OSError, ValueError, RecursionError) as error:
        raise CheckpointError(f"{path} is damaged, it is not JSON: {_one_line(error)}") from None
    if not isinstance(values, dict):
        raise CheckpointError(f"{path} is damaged: it must hold a JSON object")
    return values


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
        sharded_state_dict: as for ``dist_checkpointing.load``; asking for less than the checkpoint holds is allowed.
        expected_model: the run's ``Recipe.to_dict()["model"]``: every setting that changes what the weights mean must be
            the checkpoint's own.
        may_be_missing: tells by its checkpoint key whether a tensor may be absent; it is then absent from the result too.

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
        return dist_checkpointing.load(
            sharded_state_dict, str(folder), strict="ignore_all" if may_be_missing else "assume_ok_unexpected"
        )
    raise AssertionError("unreachable: the block above returns or raises")


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
        for entry in nested_values(load_preprocess(sharded_state_dict)[0]):
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


def prepare_optimizer_for_load(optimizer: Any) -> None:
    """Gives a fresh distributed optimizer the state that loading fills in; call it before its ``sharded_state_dict``.

    Without Transformer Engine or Apex the optimizer is torch's AdamW, whose state is empty until its first step, and the
    ``dp_reshardable`` format needs the tensors to be there.
    """
    for part in _parts(optimizer):
        if hasattr(part, "_init_optimizer_states_with_dummy_values"):
            part._init_optimizer_states_with_dummy_values()


def restore_adam_steps(optimizer: Any) -> None:
    """Sets torch AdamW's step counts from the loaded parameter groups; call it after ``optimizer.load_state_dict``.

    megatron-core's distributed optimizer keeps one step count per group (as fused Adams do). torch's AdamW keeps one per
    parameter, and would go on from that of :func:`prepare_optimizer_for_load`: the bias correction, and so the
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
    """If the block fails on any rank, raises one and the same CheckpointError on all: no rank waits for another forever.

    ``needed`` bytes below ``root`` are named when the reason is a full disk.
    """
    message: str | None = None
    cause: Exception | None = None
    try:
        yield
    except CheckpointError as error:
        message, cause = str(error), error.__cause__ if isinstance(error.__cause__, Exception) else None
    except Exception as error:
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

    torch.distributed.checkpoint's planner asks for ``weights_only=False``; this variable is torch's own way to forbid it.
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


def _flush_to_disk(path: Path) -> None:
    descriptor = os.open(path, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)


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
        named = re.search(r"(?:GLOBAL|Unsupported (?:class|global):?) +([\w.]+)", text)
        return f"it holds {named[1] if named else 'something'}, which is neither a tensor nor a plain value"
    if isinstance(error, OSError) and error.strerror:
        return f"{error.strerror}: {error.filename}" if error.filename else error.strerror
    return f"{type(error).__name__}: {text.splitlines()[0]}" if text else type(error).__name__


def _size(count: int) -> str:
    for unit, factor in (("GB", 10**9), ("MB", 10**6), ("kB", 10**3)):
        if count >= factor:
            return f"{count / factor:.1f} {unit}"
    return f"{count} bytes"
