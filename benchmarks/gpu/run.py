"""A GPU check while it runs: rows that are on disk as soon as they are made, a budget, and errors that stop nothing."""

import json
import math
import os
import time
import traceback
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch

from gpu.sizes import Sizes

ROWS = "rows.jsonl"
MOST_SHOWN = 300  # characters of a row on the terminal


class DeviceLostError(RuntimeError):
    """A kernel broke the CUDA context: every later call on the GPU fails in this process."""


@dataclass(frozen=True)
class Part:
    """One part of the check.

    Attributes:
        function: makes the part's rows.
        least: seconds that it may take, rounded up from those on an H200; it is skipped where less is left.
    """

    name: str
    function: Callable[["Run"], None]
    least: float


class Run:
    """What all parts of one check share.

    Args:
        folder: the rows are appended to the file ROWS in it.
        device: cuda or cpu.
        seconds: the budget, from now on.
    """

    def __init__(self, folder: Path, device: str, sizes: Sizes, seconds: float) -> None:
        self.folder, self.device, self.sizes = folder, device, sizes
        self._started = time.monotonic()
        self._end, self._part = self._started + seconds, ""
        folder.mkdir(parents=True, exist_ok=True)
        with open(folder / ROWS, "ab+") as file:
            # A row that was being written when an earlier process was killed has no line end.
            file.seek(0)
            file.truncate(file.read().rfind(b"\n") + 1)

    def left(self) -> float:
        """Seconds of the budget; negative after its end."""
        return self._end - time.monotonic()

    def row(self, kind: str, **content: Any) -> None:
        """Writes a row: on the disk itself, as the machine may be gone a moment later.

        Args:
            kind: note, check, time, cost, waits, skipped, failed or done; the summary goes by it.
        """
        seconds = round(time.monotonic() - self._started, 1)
        # JSON has no infinity and no NaN.
        values = {k: str(v) if isinstance(v, float) and not math.isfinite(v) else v for k, v in content.items()}
        line = json.dumps({"t": seconds, "part": self._part, "kind": kind, **values}, default=str)
        with open(self.folder / ROWS, "a", encoding="utf-8") as file:
            file.write(line + "\n")
            file.flush()
            os.fsync(file.fileno())
        print(line[:MOST_SHOWN], flush=True)

    def part(self, part: Part) -> None:
        """Runs a part, unless it does not fit into the budget."""
        self._part = part.name
        begin = time.monotonic()
        if self.attempt(part.name, lambda: part.function(self), part.least):
            self.row("done", seconds=round(time.monotonic() - begin, 1))

    def attempt(self, name: str, function: Callable[[], object], least: float = 0.0) -> bool:
        """Calls the function if ``least`` seconds are left. An error becomes a row; true: it came to its end.

        Raises:
            DeviceLostError: nothing more can be done on the GPU in this process.
        """
        if self.left() < least:
            self.row("skipped", name=name, reason=f"takes about {least:.0f} s, {max(self.left(), 0):.0f} s are left")
            return False
        try:
            function()
        except DeviceLostError:
            raise
        except Exception as error:
            self.row("failed", name=name, error=error_line(error), trace=traceback.format_exc(limit=-6)[-2000:])
        else:
            return True
        # Here the error is gone, and with it what its frames held.
        self._release()
        return False

    def _release(self) -> None:
        if self.device != "cuda":
            return
        try:
            torch.cuda.synchronize()
            torch.cuda.empty_cache()
        except RuntimeError as error:
            self.row("note", lost=error_line(error))
            raise DeviceLostError(error_line(error)) from None


def error_line(error: BaseException) -> str:
    return f"{type(error).__name__}: {' '.join(str(error).split())}"[:500]
