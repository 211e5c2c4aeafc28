"""The folder that megatron-core keeps the indices of a dataset's samples in."""

import hashlib
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path

import numpy
import torch

from megatron_dmc.config import ConfigError
from megatron_dmc.training.data.indexed_dataset import DatasetIndex


def index_cache(cache: str, indices: Sequence[DatasetIndex]) -> str:
    """A folder below ``cache`` of its own for this content; every rank must call.

    megatron-core's names of cached files know a dataset's path and not what it holds, so a dataset built again under
    its old name would be read by stale indices.
    """
    digest = hashlib.sha256("".join(index.digest for index in indices).encode()).hexdigest()[:16]
    folder = Path(cache, digest)
    with using_cache(cache):
        folder.mkdir(parents=True, exist_ok=True)
        if torch.distributed.get_rank() == 0:
            _remove_damaged(folder)
    torch.distributed.barrier()
    return str(folder)


@contextmanager
def using_cache(cache: str) -> Iterator[None]:
    """Turns what the file system refuses into a ConfigError."""
    try:
        yield
    except Exception as error:
        # on rank 0 megatron-core raises a plain Exception from the OSError
        cause = error if isinstance(error, OSError) else error.__cause__
        if not isinstance(cause, OSError):
            raise
        raise ConfigError(f"data.cache {cache} cannot be used: {cause.strerror or cause}") from None


def _remove_damaged(folder: Path) -> None:
    """Removes cached arrays that a killed run left unfinished, and any that megatron-core would have to unpickle."""
    for path in folder.glob("*_index.npy"):
        try:
            whole = isinstance(numpy.load(path, mmap_mode="r", allow_pickle=False), numpy.memmap)
        except (ValueError, EOFError):
            whole = False
        if not whole:
            path.unlink()
