"""How far a conversion is: bytes written, of how many, and bytes per second."""

import contextlib
import sys
from collections.abc import Callable, Iterator
from dataclasses import dataclass

from rich.console import Console
from rich.progress import BarColumn, DownloadColumn, Progress, TextColumn, TimeRemainingColumn, TransferSpeedColumn

from megatron_dmc.checkpoint.agreement import size_text


@dataclass(frozen=True)
class Written:
    """What a conversion has written and looked at again: every name and shape in the files, every value while it passed.

    Attributes:
        tensors: how many.
        bytes: of their elements.
    """

    tensors: int
    bytes: int

    def __str__(self) -> str:
        return f"{self.tensors} tensors, {size_text(self.bytes)}; names, shapes and sizes checked, all values finite"


@contextlib.contextmanager
def progress(what: str, total: int) -> Iterator[Callable[[int], None]]:
    """Yields a function to call with the bytes that were written; a bar on stderr, and only where that is a terminal."""
    console = Console(stderr=True)
    if not console.is_terminal or console.is_dumb_terminal:
        yield lambda count: None
        return
    columns = (
        TextColumn("{task.description}", markup=False),
        BarColumn(),
        DownloadColumn(),
        TransferSpeedColumn(),
        TimeRemainingColumn(),
    )
    # A redirected standard output must reach its file, not this terminal.
    with Progress(*columns, console=console, transient=True, redirect_stdout=sys.stdout.isatty()) as bar:
        task = bar.add_task(what, total=total)
        yield lambda count: bar.advance(task, count)
