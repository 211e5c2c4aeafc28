"""Writes a checkpoint's data files: of tensors that are there, or of some that are made one by one when they are written."""

import io
import os
from collections.abc import Callable, Mapping
from typing import Any

import torch
from megatron.core.dist_checkpointing.mapping import ShardedTensor, ShardedTensorFactory
from megatron.core.dist_checkpointing.strategies.torch import MCoreSavePlanner
from torch import Tensor
from torch.distributed.checkpoint import FileSystemWriter, SavePlan, SavePlanner
from torch.distributed.checkpoint.filesystem import _StorageInfo
from torch.distributed.checkpoint.planner import WriteItem
from torch.distributed.checkpoint.storage import WriteResult
from torch.futures import Future

from megatron_dmc.errors import DMCError


class Writer(FileSystemWriter):
    """torch's own, which says of a failure what came first, and nothing of a folder that is gone a moment later."""

    def storage_meta(self) -> None:
        """Nothing: torch would record the path of the temporary folder."""

    def write_data(self, plan: SavePlan, planner: SavePlanner) -> Any:
        """Writes this rank's file; a full disk is an OSError, Ctrl-C a KeyboardInterrupt.

        torch's zip writer stumbles over the unfinished file while it handles either and raises a RuntimeError about
        positions. What came first is all that the other ranks are to be told.
        """
        try:
            return self._write_plan(plan, planner)
        except RuntimeError as error:
            first: BaseException | None = error
            while first is not None and not isinstance(first, (OSError, KeyboardInterrupt, DMCError)):
                first = first.__context__
            raise first or error from None

    def _write_plan(self, plan: SavePlan, planner: SavePlanner) -> Any:
        return super().write_data(plan, planner)


class OnDemand:
    """Tensors of which a checkpoint's state knows the shape only (they are on the meta device), made when they are written.

    Attributes:
        failure: the project's own error that ended the writing, if one did.
    """

    def __init__(
        self,
        state: Mapping[str, Any],
        make: Callable[[str], Tensor],
        advance: Callable[[int], None] = lambda count: None,
    ) -> None:
        """
        Args:
            state: a model's sharded state dict, its parameters on the meta device.
            make: a name in ``state`` -> its tensor, on the CPU. Asked once per tensor, in the order of the file.
            advance: told of bytes after they were written.
        """
        kinds = ShardedTensor | ShardedTensorFactory
        # Kept as they are now: megatron-core gives a layer's tensor one more axis. A storage that is gone might lend its
        # address to another.
        self._planned = {name: entry.data for name, entry in state.items() if isinstance(entry, kinds)}
        self._names = {_storage(planned): name for name, planned in self._planned.items()}
        self._make, self.advance = make, advance
        self._held: tuple[str, Tensor] | None = None
        self.failure: DMCError | None = None

    def part(self, like: Tensor) -> Tensor:
        """What a tensor on the meta device stands for: a parameter, or the part of one that is stored by itself."""
        name = self._names[_storage(like)]
        if self._held is None or self._held[0] != name:
            # Two at a time would not fit.
            self._held = None
            self._held = name, self._made(name)
        return self._held[1].as_strided(like.size(), like.stride(), like.storage_offset())

    def _made(self, name: str) -> Tensor:
        try:
            tensor = self._make(name).contiguous()
        except DMCError as error:
            self.failure = error
            raise
        planned = self._planned[name]
        if tensor.shape != planned.shape or tensor.dtype != planned.dtype:
            raise RuntimeError(
                f"{name}: {tensor.dtype} {list(tensor.shape)} came where {planned.dtype} {list(planned.shape)} was planned"
            )
        return tensor


class OnDemandPlanner(MCoreSavePlanner):
    """Resolves an item of a plan to what it stands for."""

    def __init__(self, source: OnDemand) -> None:
        super().__init__(dedup_replicated_tensors=False, flatten_state_dict=False)
        self._source = source

    def resolve_data(self, write_item: WriteItem) -> Tensor | io.BytesIO:
        found = super().resolve_data(write_item)
        return self._source.part(found) if isinstance(found, Tensor) else found


class OneByOneWriter(Writer):
    """Writes an item before it resolves the next. torch's own holds one tensor of every name until the file is whole."""

    def __init__(self, path: Any, source: OnDemand) -> None:
        super().__init__(path, thread_count=1)
        self._source = source

    def _write_plan(self, plan: SavePlan, planner: SavePlanner) -> Any:
        name = f"{plan.storage_data.prefix}0.distcp"
        results = []
        with open(os.path.join(self.path, name), "wb") as stream:
            for item in plan.items:
                begin = stream.tell()
                _write(planner.resolve_data(item), stream)
                length = stream.tell() - begin
                place = _StorageInfo(name, begin, length)
                results.append(WriteResult(index=item.index, size_in_bytes=length, storage_data=place))
                self._source.advance(length)
            stream.flush()
            os.fsync(stream.fileno())
        done: Future[list[WriteResult]] = Future()
        done.set_result(results)
        return done


def _write(data: Tensor | io.BytesIO, stream: Any) -> None:
    if isinstance(data, io.BytesIO):
        stream.write(data.getbuffer())
        return
    # torch.save writes all of a storage, also what a part of it leaves out.
    is_part = data.untyped_storage().nbytes() != data.nbytes
    torch.save(data.clone() if is_part else data, stream)


def _storage(tensor: Tensor) -> int:
    """The same for all views of one tensor; on the meta device there is no address to tell them by."""
    return int(tensor.untyped_storage()._cdata)
