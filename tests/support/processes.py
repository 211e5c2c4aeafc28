"""Processes that tests start: programs, the product's commands, and ranks that find one another."""

import os
import socket
import subprocess
import sys
from collections.abc import Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from pathlib import Path

ROOT = Path(__file__).resolve().parents[2]
PRODUCT = ("-m", "megatron_dmc")


def environment(**variables: str) -> dict[str, str]:
    """This process's, with one thread; ``tests`` can be imported from any working folder."""
    inherited = os.environ.get("PYTHONPATH", "")
    paths = [str(ROOT), *(os.path.abspath(path) for path in inherited.split(os.pathsep) if path)]
    return {**os.environ, "PYTHONPATH": os.pathsep.join(paths), "OMP_NUM_THREADS": "1", **variables}


def meeting_place() -> dict[str, str]:
    """Where ranks find one another: a port of this machine that nothing listens on."""
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return {"MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(probe.getsockname()[1])}


def run(
    *arguments: object, folder: Path | None = None, timeout: float = 120, **variables: str
) -> subprocess.CompletedProcess[str]:
    """``python ARGUMENTS`` to its end: status, stdout and stderr.

    Args:
        folder: to run it in.
        variables: of the environment.
    """
    return subprocess.run(
        [sys.executable, *map(str, arguments)],
        cwd=folder,
        env=environment(**variables),
        capture_output=True,
        text=True,
        timeout=timeout,
    )


def run_ranks(
    count: int, *arguments: object, folders: Sequence[Path] | None = None, timeout: float = 600
) -> list[subprocess.CompletedProcess[str]]:
    """The same ``python ARGUMENTS`` in ``count`` processes, as torchrun starts them.

    Args:
        folders: to run them in, one of each.
    """
    place = meeting_place() | {"WORLD_SIZE": str(count)}

    def rank(number: int) -> subprocess.CompletedProcess[str]:
        folder = None if folders is None else folders[number]
        return run(*arguments, folder=folder, timeout=timeout, RANK=str(number), **place)

    with ThreadPoolExecutor(count) as pool:
        return list(pool.map(rank, range(count)))


@contextmanager
def started(*arguments: object, **variables: str) -> Iterator[subprocess.Popen[str]]:
    """``python ARGUMENTS`` while the block runs; it does not outlive the block. Its stdout holds its stderr, too."""
    with subprocess.Popen(
        [sys.executable, *map(str, arguments)],
        env=environment(**variables),
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        text=True,
    ) as process:
        try:
            yield process
        finally:
            process.kill()


_CLAIMS = """
import sys, time
from pathlib import Path
from megatron_dmc.files import Claim
claim = Claim(Path(sys.argv[1]))
print(claim.problem, flush=True)
time.sleep(600)
"""


@contextmanager
def at_work_in(folder: Path) -> Iterator[subprocess.Popen[str]]:
    """A process that has the claim of a folder, until it is killed or the block ends."""
    with subprocess.Popen(
        [sys.executable, "-c", _CLAIMS, str(folder)], env=environment(), stdout=subprocess.PIPE, text=True
    ) as process:
        try:
            assert process.stdout is not None and process.stdout.readline() == "None\n"
            yield process
        finally:
            process.kill()
