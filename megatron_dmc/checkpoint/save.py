"""Saves a checkpoint: staged at one moment of the training, then written aside, checked, and renamed when it is whole.

Staging needs the model to stand still; writing does not, and may go on in a thread (see ``background``) on a
process group of its own.

The data is written by torch's own ``FileSystemWriter`` in the calling process. ``dist_checkpointing.save`` spawns a
manager and a process per file instead: 5 seconds for the first save, a ``__main__`` guard in every script, and rank 0's
own failures (``common.pt`` on a full disk) leave the others waiting. The files are the same: ``dist_checkpointing.load``
reads them.
"""

import io
import json
import pickle
import secrets
import shutil
import socket
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
from megatron.core.dist_checkpointing.dict_utils import nested_values
from megatron.core.dist_checkpointing.mapping import ShardedTensor, is_main_replica
from megatron.core.dist_checkpointing.state_dict_utils import save_preprocess
from megatron.core.dist_checkpointing.strategies.torch import (
    MCoreSavePlanner,
    _replace_state_dict_keys_with_sharded_keys,
    mcore_to_pyt_state_dict,
)
from torch.distributed.checkpoint import save as torch_save

from megatron_dmc.checkpoint.agreement import gather, on_all_ranks, one_line, size_text
from megatron_dmc.checkpoint.companions import copy_tokenizer
from megatron_dmc.checkpoint.folder import (
    FORMAT_VERSION,
    CheckpointError,
    CheckpointInfo,
    flush_to_disk,
    prune,
    put_in_place,
    remove_leftovers,
    update_latest,
)
from megatron_dmc.checkpoint.writer import OnDemand, OnDemandPlanner, OneByOneWriter, Writer
from megatron_dmc.files import CHECKPOINT_MARK

# metadata.json of every checkpoint written here: the backends that dist_checkpointing.load is to use. megatron-core < 0.17
# writes all four entries and newer ones the first two; each reads the other's.
SHARDED_BACKEND = {"sharded_backend": "torch_dist", "sharded_backend_version": 1}
BACKENDS = SHARDED_BACKEND | {"common_backend": "torch", "common_backend_version": 1}


@dataclass(frozen=True)
class StagedCheckpoint:
    """What this rank writes of a checkpoint.

    Attributes:
        values: torch's sharded tensors and pickled objects, by checkpoint key.
        common: plain values; rank 0 writes them.
        tensor_bytes: of the tensors in ``values``.
        source: makes the tensors when they are written, where those in ``values`` are on the meta device.
    """

    values: dict[str, Any]
    common: dict[str, Any]
    tensor_bytes: int
    source: OnDemand | None = None


def save_checkpoint(
    root: str | Path,
    name: str,
    sharded_state_dict: dict[str, Any],
    info: CheckpointInfo,
    tokenizer_folder: str | Path | None = None,
) -> Path:
    """Writes ``root/name``: :func:`stage_checkpoint`, then :func:`write_checkpoint`; every rank calls this together."""
    staged = stage_checkpoint(sharded_state_dict)
    return write_checkpoint(root, name, staged, info, tokenizer_folder)


def save_on_demand(
    root: str | Path, name: str, sharded_state_dict: dict[str, Any], info: CheckpointInfo, source: OnDemand
) -> Path:
    """As :func:`save_checkpoint`, of a state on the meta device: ``source`` makes each tensor when it is written.

    Raises:
        DMCError: that of ``source``, if it raised one.
        CheckpointError: as :func:`save_checkpoint`.
    """
    staged = replace(stage_checkpoint(sharded_state_dict), source=source)
    try:
        return write_checkpoint(root, name, staged, info)
    except CheckpointError:
        if source.failure is not None:
            raise source.failure from None
        raise


def stage_checkpoint(sharded_state_dict: dict[str, Any], *, copies: bool = False) -> StagedCheckpoint:
    """What a checkpoint is to hold, as it stands now; every rank of the default process group calls this together.

    Args:
        sharded_state_dict: as for ``dist_checkpointing.save``: sharded tensors and objects, and plain values that are
            the same on all ranks. Factories in it are applied in place.
        copies: to the host's memory, so that training may go on before the checkpoint is written.

    Raises:
        CheckpointError: on all ranks, if anything failed on any.
    """
    with on_all_ranks("cannot save a checkpoint"):
        sharded, common = save_preprocess(sharded_state_dict)
        entries = [entry for entry in nested_values(sharded) if _writes_tensor(entry)]
        if copies:
            for entry in entries:
                entry.data = _host_copy(entry.data)
        by_key, _, _ = _replace_state_dict_keys_with_sharded_keys(sharded, keep_only_main_replica=True)
        values = mcore_to_pyt_state_dict(by_key)
        for key, value in values.items():
            if isinstance(value, io.BytesIO):
                _must_be_loadable(value, key)
    return StagedCheckpoint(values, common, sum(entry.data.nbytes for entry in entries))


def _writes_tensor(entry: Any) -> bool:
    """Whether this rank writes the entry, and it is a tensor."""
    return isinstance(entry, ShardedTensor) and is_main_replica(entry.replica_id)


def _host_copy(tensor: torch.Tensor) -> torch.Tensor:
    # On a GPU what lies on the host already was gathered there for this checkpoint; on a CPU it may be the model's own.
    lives_on_host = tensor.device.type == "cpu" and not torch.cuda.is_available()
    return tensor.detach().to("cpu", copy=lives_on_host)


def write_checkpoint(
    root: str | Path,
    name: str,
    staged: StagedCheckpoint,
    info: CheckpointInfo,
    tokenizer_folder: str | Path | None = None,
    group: dist.ProcessGroup | None = None,
) -> Path:
    """Writes ``root/name``; every rank of ``group`` calls this together.

    An existing ``root/name`` is replaced only when the new one is whole. What a killed run left behind in ``root`` is
    removed. ``latest`` is not touched (:func:`publish`).

    Args:
        root: on storage that all nodes share; made if absent.
        name: a plain folder name, such as ``step_00000600``.
        info: written as ``dmc.json``.
        tokenizer_folder: copied to ``tokenizer/``, as :func:`copy_tokenizer` does.
        group: all ranks; in a thread it must be one (for the CPU) that nothing else uses. None: the default group.

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
    temporary = folder.with_name(f".{name}.tmp-{gather(secrets.token_hex(4), group)[0]}")
    try:
        _write(temporary, folder, staged, info, tokenizer_folder, group)
        with on_all_ranks(f"cannot save {folder}", group=group):
            if dist.get_rank() == 0:
                put_in_place(temporary, folder)
    except (CheckpointError, KeyboardInterrupt):
        if dist.get_rank() == 0:
            shutil.rmtree(temporary, ignore_errors=True)
        raise
    return folder


def publish(root: str | Path, name: str, keep_last: int, group: dist.ProcessGroup | None = None) -> None:
    """Moves ``latest`` to a saved full checkpoint and prunes older ones; every rank of ``group`` calls this together.

    Raises:
        CheckpointError: on all ranks, if rank 0 could not.
    """
    with on_all_ranks(f"cannot make {Path(root) / name} the latest checkpoint", group=group):
        if dist.get_rank() == 0:
            update_latest(root, name)
            prune(root, keep_last)


def _write(
    temporary: Path,
    folder: Path,
    staged: StagedCheckpoint,
    info: CheckpointInfo,
    tokenizer_folder: str | Path | None,
    group: dist.ProcessGroup | None,
) -> None:
    """All of a checkpoint's files, in ``temporary``. Each block below is one thing that can fail on some ranks only."""
    what = f"cannot save {folder}"
    is_first = dist.get_rank() == 0
    with on_all_ranks(what, group=group):
        if is_first:
            folder.parent.mkdir(parents=True, exist_ok=True)
            remove_leftovers(folder.parent)
            temporary.mkdir()
    with on_all_ranks(what, group=group):
        if not temporary.is_dir():
            raise CheckpointError(
                f"{what}: rank {dist.get_rank()} on {socket.gethostname()} does not see {temporary.name}, which rank 0 "
                "made; the folder must be on storage that all nodes share"
            )
    needed = sum(gather(staged.tensor_bytes, group))
    with on_all_ranks(what, needed, folder.parent, group):
        if is_first:
            _must_have_space(folder.parent, needed, what)
            buffer = io.BytesIO()
            torch.save(staged.common, buffer)
            _must_be_loadable(buffer, "the plain values of the state")
            (temporary / "common.pt").write_bytes(buffer.getbuffer())
    with on_all_ranks(what, needed, folder.parent, group):
        writer: Writer = Writer(temporary, thread_count=1)
        planner = MCoreSavePlanner(dedup_replicated_tensors=False, flatten_state_dict=False)
        if staged.source is not None:
            writer, planner = OneByOneWriter(temporary, staged.source), OnDemandPlanner(staged.source)
        torch_save(staged.values, storage_writer=writer, planner=planner, process_group=group)
    with on_all_ranks(what, needed, folder.parent, group):
        if is_first:
            (temporary / "metadata.json").write_text(json.dumps(BACKENDS), encoding="utf-8")
            if tokenizer_folder is not None:
                if not Path(tokenizer_folder, "tokenizer.json").is_file():
                    raise CheckpointError(
                        f"the tokenizer {tokenizer_folder} has no tokenizer.json, so the checkpoint cannot be completed"
                    )
                copy_tokenizer(Path(tokenizer_folder), temporary / "tokenizer")
            text = json.dumps({"format_version": FORMAT_VERSION, **asdict(info)}, indent=2)
            (temporary / CHECKPOINT_MARK).write_text(text + "\n", encoding="utf-8")
            for path in (*temporary.rglob("*"), temporary):
                flush_to_disk(path)


def _must_be_loadable(buffer: io.BytesIO, what: str) -> None:
    """Refuses at once what the weights-only loader would refuse when the run is resumed."""
    buffer.seek(0)
    try:
        torch.load(buffer, weights_only=True)
    except pickle.UnpicklingError as error:
        raise CheckpointError(f"cannot save {what}: {one_line(error)}; save plain values and tensors only") from None


def _must_have_space(root: Path, needed: int, what: str) -> None:
    space = shutil.disk_usage(root)
    # Some network file systems report no size at all.
    if space.total > 0 and space.free < needed:
        raise CheckpointError(
            f"{what}: it needs {size_text(needed)} and {size_text(space.free)} are free; nothing was written, "
            "earlier checkpoints are untouched"
        )
