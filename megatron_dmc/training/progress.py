"""A run's progress on stderr: a bar on a terminal, plain lines in a log file."""

import sys
import time
from collections import deque
from collections.abc import Callable, Iterable
from contextlib import suppress
from types import TracebackType
from typing import TextIO

from rich.console import Console, RenderableType
from rich.progress import BarColumn, Progress, TextColumn
from rich.text import Text

from megatron_dmc.training.monitor import StepRecord

# The ETA follows the speed of this many last updates, so a phase that is slower or faster soon shows.
SPEED_WINDOW = 50
SHORTEST_REDRAW_SECONDS = 0.1


class TrainingProgress:
    """Shows phase, step, losses, compression ratio and its target, speed and time left.

    On a terminal a bar and a line of values are redrawn in place, in 80 columns. Anywhere else (SLURM logs, CI, a pipe) it
    prints a plain line with the first update and then at most one every ``line_interval_seconds``; the run's last step is
    always shown. A line that cannot be written (a full disk, a closed pipe) is left out: it never stops a training.

    Args:
        total_steps: of the whole run.
        done_steps: that a resumed run starts from.
        enabled: False on every rank but one: nothing is shown.
        quiet: only messages that are ``important`` are shown.
        stream: where to write; None is stderr.
    """

    def __init__(
        self,
        total_steps: int,
        *,
        done_steps: int = 0,
        enabled: bool = True,
        quiet: bool = False,
        stream: TextIO | None = None,
        line_interval_seconds: float = 30.0,
    ) -> None:
        self._total_steps = total_steps
        self._enabled, self._quiet = enabled, quiet
        self._stream = stream or sys.stderr
        self._line_interval_seconds = line_interval_seconds
        self._last_shown = float("-inf")
        self._times: deque[tuple[float, int]] = deque(maxlen=SPEED_WINDOW)
        self._bar = self._start_bar(done_steps) if enabled and not quiet else None
        self.start_clock(done_steps)

    def start_clock(self, done_steps: int) -> None:
        """The time left is reckoned from the steps after this call."""
        self._times.clear()
        self._times.append((time.monotonic(), done_steps))

    def update(self, record: StepRecord) -> None:
        """Shows a step that is done."""
        if not self._enabled or self._quiet:
            return
        now = time.monotonic()
        self._times.append((now, record.step))
        last = record.step >= self._total_steps
        shortest = self._line_interval_seconds if self._bar is None else SHORTEST_REDRAW_SECONDS
        if now - self._last_shown < shortest and not last:
            return
        self._last_shown = now
        values = _values(record)
        speed = f"{short_number(record.tokens_per_second)} tok/s"
        eta = f"ETA {format_duration(self._seconds_left(record.step))}"
        if self._bar is None:
            step = f"step {record.step}/{self._total_steps}"
            self._print(" | ".join([record.phase, step, *values, speed, eta]))
        else:
            self._bar.values = "  ".join(values)
            self._draw(lambda bar: bar.show(record.step, record.phase, f"{speed}  {eta}"))

    def message(self, text: str, *, important: bool = False) -> None:
        """Lines for the reader (a checkpoint was saved, an evaluation's result), above the bar."""
        if not self._enabled or (self._quiet and not important):
            return
        if self._bar is None:
            self._print(text)
        else:
            self._draw(lambda bar: bar.console.print(text, markup=False, highlight=False, soft_wrap=True))

    def _draw(self, draw: Callable[["_Bar"], None]) -> None:
        """Where the terminal has gone, the bar goes as well."""
        if self._bar is None:
            return
        try:
            draw(self._bar)
        except OSError:
            bar, self._bar = self._bar, None
            with suppress(OSError):
                bar.stop()

    def _print(self, line: str) -> None:
        with suppress(OSError):
            print(line, file=self._stream, flush=True)

    def close(self) -> None:
        self._draw(_Bar.stop)

    def __enter__(self) -> "TrainingProgress":
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, traceback: TracebackType | None
    ) -> None:
        self.close()

    def _start_bar(self, done_steps: int) -> "_Bar | None":
        if not self._stream.isatty():
            return None
        console = Console(file=self._stream, force_terminal=True)
        if console.is_dumb_terminal:
            return None
        bar = _Bar(
            TextColumn("{task.fields[phase]} {task.completed:.0f}/{task.total:.0f}", markup=False),
            BarColumn(bar_width=None),
            TextColumn("{task.fields[speed]}", markup=False),
            console=console,
            expand=True,
            # Drawn from update() alone, without a thread.
            auto_refresh=False,
            # A redirected standard output must reach its file, not this terminal.
            redirect_stdout=sys.stdout.isatty(),
        )
        bar.add_task("", total=self._total_steps, completed=done_steps, phase="starting", speed="")
        bar.start()
        return bar

    def _seconds_left(self, step: int) -> float | None:
        (first_time, first_step), (last_time, last_step) = self._times[0], self._times[-1]
        if last_step <= first_step:
            return None
        return (self._total_steps - step) * (last_time - first_time) / (last_step - first_step)


def format_duration(seconds: float | None) -> str:
    """``0:01:05``, ``2d 03:00:00``; ``-`` for an unknown time."""
    if seconds is None:
        return "-"
    minutes, rest = divmod(round(seconds), 60)
    hours, minutes = divmod(minutes, 60)
    days, hours = divmod(hours, 24)
    return f"{days}d {hours:02d}:{minutes:02d}:{rest:02d}" if days else f"{hours}:{minutes:02d}:{rest:02d}"


class _Bar(Progress):
    """A bar, and a line of values below it."""

    values = ""

    def show(self, step: int, phase: str, speed: str) -> None:
        (task,) = self.task_ids
        self.update(task, completed=step, phase=phase, speed=speed, refresh=True)

    def get_renderables(self) -> Iterable[RenderableType]:
        yield from super().get_renderables()
        if self.values:
            yield Text(self.values)


def _values(record: StepRecord) -> list[str]:
    values = [f"loss {record.lm_loss:.4f}"]
    if record.distillation_loss is not None:
        values.append(f"KL {record.distillation_loss:.4f}")
    if record.compression_ratio is not None:
        target = record.target_compression_ratio
        values.append(f"CR {record.compression_ratio:.2f}" + ("" if target is None else f" (target {target:.2f})"))
    return values


def short_number(number: float) -> str:
    for size, suffix in ((1e9, "G"), (1e6, "M"), (1e3, "k")):
        if number >= size:
            return f"{number / size:.1f}{suffix}"
    return f"{number:.0f}"
