"""A real SLURM on this machine, for as long as the tests run."""

import os
import shutil
import socket
import subprocess
import sys
import tempfile
from collections.abc import Iterator
from pathlib import Path

import pytest

from tests.support.processes import environment
from tests.support.slurm_jobs import Cluster

CLUSTER = Path(__file__).with_name("cluster.sh")
PROGRAMS = ("munged", "slurmctld", "slurmd", "sbatch", "srun")


@pytest.fixture(scope="session")
def cluster() -> Iterator[Cluster]:
    path = f"{os.environ['PATH']}:/usr/sbin:/sbin"
    missing = [program for program in PROGRAMS if shutil.which(program, path=path) is None]
    if missing:
        pytest.skip(f"no SLURM here ({', '.join(missing)} missing): make slurm installs it on Debian, as root")
    # Sockets need a short path.
    folder = Path(tempfile.mkdtemp(prefix="slurm-"))
    try:
        subprocess.run([CLUSTER, "start", folder, str(free_ports(3))], check=True, timeout=120)
        lines = (folder / "environment").read_text().splitlines()
        # These tests may run inside a job: its variables must not reach the jobs that they submit.
        outer = {name: value for name, value in environment().items() if not name.startswith(("SLURM_", "SBATCH_"))}
        # SLURM does not create the folder of a job's output: the job would fail without a message.
        logs = folder / "logs"
        logs.mkdir()
        yield Cluster(
            {
                **outer,
                **dict(line.split("=", maxsplit=1) for line in lines),
                "PYTHON": sys.executable,
                "PYTHONWARNINGS": "ignore",
                "DMC_LOGS": str(logs),
            },
            logs,
        )
    finally:
        subprocess.run([CLUSTER, "stop", folder], timeout=120)
        shutil.rmtree(folder, ignore_errors=True)


def free_ports(count: int) -> int:
    """The first of ``count`` ports in a row that nothing listens on."""
    for first in range(17000, 19000, count):
        try:
            for port in range(first, first + count):
                with socket.socket() as probe:
                    probe.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
                    probe.bind(("", port))
        except OSError:
            continue
        return first
    raise RuntimeError("no free ports")
