"""The folder that megatron-core keeps the indices of a dataset's samples in."""

import errno
import fcntl
import hashlib
import os
from collections.abc import Iterator, Sequence
from contextlib import ExitStack, contextmanager, nullcontext, suppress
from pathlib import Path

import numpy
import torch

from megatron_dmc.config import ConfigError
from megatron_dmc.data.indexed_dataset import DatasetIndex
from megatron_dmc.files import is_full_disk


@contextmanager
def index_cache(cache: str, indices: Sequence[DatasetIndex]) -> Iterator[str]:
    """A folder below ``cache`` of its own for this content, to build indices in; every rank must enter.

    megatron-core's names of cached files know a dataset's path and not what it holds, so a dataset built again under
    its old name would be read by stale indices. One run at a time is inside.

    Raises:
        ConfigError: what the file system refused, here or in the block.
    """
    digest = hashlib.sha256("".join(index.digest for index in indices).encode()).hexdigest()[:16]
    folder = Path(cache, digest)
    is_first = torch.distributed.get_rank() == 0
    with _using(cache):
        folder.mkdir(parents=True, exist_ok=True)
        with _alone(folder) if is_first else nullcontext():
            if is_first:
                _remove_damaged(folder)
            torch.distributed.barrier()
            yield str(folder)


@contextmanager
def _alone(folder: Path) -> Iterator[None]:
    """Waits while another run builds here: a second one would write the same files anew, below the first one's readers."""
    with ExitStack() as held:
        # A folder that is read-only is complete or of no use, and some network file systems know no locks.
        with suppress(OSError):
            fcntl.flock(held.enter_context((folder / "lock").open("a")), fcntl.LOCK_EX)
        yield


@contextmanager
def _using(cache: str) -> Iterator[None]:
    """Turns what the file system refuses into a ConfigError."""
    try:
        yield
    except Exception as error:
        # on rank 0 megatron-core raises a plain Exception from the OSError
        cause = error if isinstance(error, OSError) else error.__cause__
        if not isinstance(cause, OSError):
            raise
        hint = "; free some space, or name a folder on another disk" if is_full_disk(cause) else ""
        # numpy's error of a full disk has no reason of its own.
        reason = cause.strerror or (os.strerror(errno.ENOSPC) if is_full_disk(cause) else str(cause))
        raise ConfigError(f"data.cache {cache} cannot be used: {reason}{hint}") from None


def _remove_damaged(folder: Path) -> None:
    """Removes cached arrays that a killed run left unfinished, and any that megatron-core would have to unpickle."""
    for path in folder.glob("*_index.npy"):
        try:
            whole = isinstance(numpy.load(path, mmap_mode="r", allow_pickle=False), numpy.memmap)
        except (ValueError, EOFError):
            whole = False
        if not whole:
            path.unlink()
