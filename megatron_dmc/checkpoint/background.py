"""Checkpoints written while training goes on."""

import threading
from collections.abc import Callable
from datetime import timedelta

import torch.distributed as dist

from megatron_dmc.checkpoint.agreement import gather, on_all_ranks

# The slowest rank's file may take long; its peers wait for it in a collective.
_TIMEOUT = timedelta(hours=2)


class BackgroundWriter:
    """One write at a time, in a thread of every rank; the training's own collectives are never mixed with its.

    All ranks make it, and call :meth:`start`, :meth:`poll` and :meth:`wait` together.
    """

    def __init__(self) -> None:
        self._group = dist.new_group(backend="gloo", timeout=_TIMEOUT)
        self._thread: threading.Thread | None = None
        self._error: BaseException | None = None

    def start(self, write: Callable[[dist.ProcessGroup], None]) -> None:
        """Calls ``write`` in the background with the group whose collectives it may use; waits for an earlier one first.

        Raises:
            CheckpointError: on all ranks, if the earlier one failed.
        """
        self.wait()
        self._thread = threading.Thread(target=self._run, args=(write,), name="checkpoint")
        self._thread.start()

    def _run(self, write: Callable[[dist.ProcessGroup], None]) -> None:
        try:
            write(self._group)
        except BaseException as error:
            self._error = error

    def poll(self) -> None:
        """Takes note of a write that has ended on all ranks, without waiting for one that has not.

        Raises:
            CheckpointError: on all ranks, if it failed on any.
        """
        # Either all ranks have a thread here or none has: it is given up only when it has ended everywhere.
        if self._thread is not None and all(gather(not self._thread.is_alive())):
            self.wait()

    def wait(self) -> None:
        """As :meth:`poll`, after the write has ended."""
        if self._thread is None:
            return
        self._thread.join()
        self._thread = None
        error, self._error = self._error, None
        with on_all_ranks("cannot save a checkpoint"):
            if error is not None:
                raise error

    def close(self) -> None:
        """Lets the write of this rank end and looks at nothing: for a run that is failing already."""
        if self._thread is not None:
            self._thread.join()
            self._thread = None
