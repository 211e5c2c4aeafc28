"""Which implementation of an operation runs: the one place that knows what ``backend=`` may be."""

from collections.abc import Mapping
from typing import TypeVar

Implementation = TypeVar("Implementation")


def choose(backend: str, implementations: Mapping[str, Implementation]) -> Implementation:
    """The implementation that ``backend`` names.

    Args:
        backend: "auto" or one of the names.
        implementations: by name, the fastest first; "auto" takes that one.

    Raises:
        ValueError: there is no implementation of this name.
    """
    if backend == "auto":
        return next(iter(implementations.values()))
    if backend not in implementations:
        *others, last = ("auto", *implementations)
        raise ValueError(f"backend must be {', '.join(others)} or {last}, got {backend!r}")
    return implementations[backend]
