"""What a plan is busy with: one line on stderr, and only where stderr is a terminal."""

import contextlib
from collections.abc import Callable, Iterator

from rich.console import Console


@contextlib.contextmanager
def progress(console: Console | None = None) -> Iterator[Callable[[str], None]]:
    """Yields a function that replaces the line; the line goes away with the block."""
    console = console or Console(stderr=True)
    if not console.is_terminal:
        yield lambda state: None
        return
    with console.status("") as status:
        yield status.update
