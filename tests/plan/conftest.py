"""A process for plans alone: they make fake worlds, and the tests' own process may be in a real one."""

import multiprocessing
from collections.abc import Callable, Iterator
from concurrent.futures import ProcessPoolExecutor
from typing import Any

import pytest


@pytest.fixture(scope="session")
def elsewhere() -> Iterator[Callable[..., Any]]:
    """``elsewhere(function, *args)`` runs a module's function there and returns its result."""
    with ProcessPoolExecutor(1, multiprocessing.get_context("spawn")) as pool:
        yield lambda function, *args, **kwargs: pool.submit(function, *args, **kwargs).result()
