"""A wish to stop, sent to a process as a signal.

Ctrl-C, SIGUSR1 ahead of a time limit, SIGTERM ahead of preemption, SIGHUP when the terminal closes.
"""

import contextlib
import os
import signal
from collections.abc import Iterator
from types import FrameType

# Exit status of a run that saved and can go on: EX_TEMPFAIL of sysexits.h, "try again later".
STOPPED = 75

_ANSWER = b"\nstopping after this step (Ctrl-C again: at once, without saving)\n"


class StopRequest:
    """What this process was asked; the ranks of a run agree on it at the end of a step (``Trainer.run``).

    Attributes:
        received: the first signal that came, None before.
    """

    def __init__(self) -> None:
        self.received: signal.Signals | None = None

    def receive(self, number: int, frame: FrameType | None = None) -> None:
        """Notes a signal. After a Ctrl-C the next one raises KeyboardInterrupt."""
        # torchrun hands the first Ctrl-C on to its workers as SIGINT and the second one as SIGTERM.
        if self.received == signal.SIGINT and number in (signal.SIGINT, signal.SIGTERM):
            raise KeyboardInterrupt
        if self.received is None and number == signal.SIGINT and _speaks():
            # Not print: the signal may have come in the middle of one.
            with contextlib.suppress(OSError):
                os.write(2, _ANSWER)
        self.received = self.received or signal.Signals(number)


def _speaks() -> bool:
    """Whether this is the run's first process, which answers for all of them."""
    return os.environ.get("RANK", os.environ.get("SLURM_PROCID", "0")) == "0"


@contextlib.contextmanager
def stop_request() -> Iterator[StopRequest]:
    """Notes the signals that would end the process, for as long as the block runs; in the main thread only."""
    request = StopRequest()
    numbers = [signal.SIGUSR1, signal.SIGTERM, signal.SIGINT]
    # nohup has it ignored: then a run goes on without its terminal.
    if signal.getsignal(signal.SIGHUP) != signal.SIG_IGN:
        numbers.append(signal.SIGHUP)
    before = {number: signal.signal(number, request.receive) for number in numbers}
    try:
        yield request
    finally:
        for number, handler in before.items():
            signal.signal(number, handler)
