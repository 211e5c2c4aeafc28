"""A wish to stop, sent to a process as a signal: SIGUSR1 ahead of a time limit, SIGTERM ahead of preemption."""

import contextlib
import signal
from collections.abc import Iterator
from types import FrameType

# Exit status of a run that saved and can go on: EX_TEMPFAIL of sysexits.h, "try again later".
STOPPED = 75


class StopRequest:
    """What this process was asked; the ranks of a run agree on it at the end of a step (``Trainer.run``).

    Attributes:
        received: the first signal that came, None before.
    """

    def __init__(self) -> None:
        self.received: signal.Signals | None = None

    def receive(self, number: int, frame: FrameType | None = None) -> None:
        self.received = self.received or signal.Signals(number)


@contextlib.contextmanager
def stop_request() -> Iterator[StopRequest]:
    """Notes SIGUSR1 and SIGTERM, which would end the process, for as long as the block runs; in the main thread only."""
    request = StopRequest()
    before = {number: signal.signal(number, request.receive) for number in (signal.SIGUSR1, signal.SIGTERM)}
    try:
        yield request
    finally:
        for number, handler in before.items():
            signal.signal(number, handler)
