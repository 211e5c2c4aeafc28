"""One outcome on all ranks: what fails on one fails on every one, in one line."""

import contextlib
import pickle
import re
import shutil
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import torch.distributed as dist
from torch.distributed.checkpoint import CheckpointException

from megatron_dmc.checkpoint.folder import CheckpointError
from megatron_dmc.files import is_full_disk


@contextlib.contextmanager
def on_all_ranks(
    what: str, needed: int | None = None, root: Path | None = None, group: dist.ProcessGroup | None = None
) -> Iterator[None]:
    """If the block fails on any rank, raises the same CheckpointError on all: no rank waits for another forever.

    A KeyboardInterrupt inside torch is one again on the rank that was interrupted.

    ``needed`` bytes below ``root`` are named when the reason is a full disk. ``group`` holds all ranks (None: the default
    group).
    """
    message: str | None = None
    cause: BaseException | None = None
    try:
        yield
    except CheckpointError as error:
        message, cause = str(error), error.__cause__
    # torch's CheckpointException, which carries the failures of all ranks, is not an Exception.
    except (Exception, CheckpointException) as error:
        message, cause = f"{what}: {one_line(error)}", error
        if needed is not None and root is not None and is_full_disk(_root_cause(error)):
            with contextlib.suppress(OSError):
                message += f" ({size_text(needed)} needed, {size_text(shutil.disk_usage(root).free)} free)"
            message += "; earlier checkpoints are untouched"
    first = next((error for error in gather(message, group) if error is not None), None)
    # torch reports it as a failure of its own; here it is what the user asked for.
    if cause is not None and isinstance(_root_cause(cause), KeyboardInterrupt):
        raise KeyboardInterrupt from None
    if first is not None:
        raise CheckpointError(first) from cause


def gather(value: Any, group: dist.ProcessGroup | None = None) -> list[Any]:
    """``value`` of every rank, in the order of the ranks."""
    values: list[Any] = [None] * dist.get_world_size()
    dist.all_gather_object(values, value, group=group)
    return values


def from_first_rank(value: Any) -> Any:
    """Rank 0's ``value``, on every rank of the default group."""
    values = [value]
    dist.broadcast_object_list(values)
    return values[0]


def one_line(error: BaseException) -> str:
    """What went wrong, without advice, lists of ranks or a second line."""
    error = _root_cause(error)
    text = str(error).strip()
    if isinstance(error, pickle.UnpicklingError):
        # torch's message is a page of advice on how to load it all the same.
        named = re.search(r"GLOBAL ([\w.]+)", text)
        return f"it holds {named[1] if named else 'something'}, which is neither a tensor nor a plain value"
    if isinstance(error, OSError) and error.strerror:
        return f"{error.strerror}: {error.filename}" if error.filename else error.strerror
    return f"{type(error).__name__}: {text.splitlines()[0]}" if text else type(error).__name__


def size_text(count: int) -> str:
    for unit, factor in (("GB", 10**9), ("MB", 10**6), ("kB", 10**3)):
        if count >= factor:
            return f"{count / factor:.1f} {unit}"
    return f"{count} bytes"


def _root_cause(error: BaseException) -> BaseException:
    """The exception of the rank that failed, out of the summary that torch.distributed.checkpoint makes."""
    if isinstance(error, CheckpointException) and error.failures:
        return _root_cause(next(iter(error.failures.values()))[0])
    return error
