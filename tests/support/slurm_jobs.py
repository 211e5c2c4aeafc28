"""Jobs on a real SLURM, by its own commands."""

import re
import subprocess
import time
from collections.abc import Callable
from pathlib import Path

from tests.support.processes import ROOT


class Cluster:
    """Submits the launcher and watches its jobs; every command ends after two minutes.

    Args:
        environment: of every command, and of the jobs with it.
    """

    def __init__(self, environment: dict[str, str], logs: Path) -> None:
        self.environment, self.logs = environment, logs

    def call(self, *command: str) -> str:
        done = subprocess.run(command, cwd=ROOT, env=self.environment, capture_output=True, text=True, timeout=120)
        assert done.returncode == 0, f"{' '.join(command)}: {done.stderr}"
        return done.stdout + done.stderr

    def submit(self, launcher: str, *overrides: str) -> str:
        """Two nodes of two tasks; returns the job's number."""
        flags = ["-N2", "--ntasks-per-node=2", "--gpus-per-node=0", f"--output={self.logs}/%x-%j.out"]
        return self.call("sbatch", "--parsable", *flags, launcher, *overrides).strip()

    def log(self, job: str) -> str:
        """What the launcher and the tasks of a job said."""
        return "".join(path.read_text() for path in sorted(self.logs.glob(f"*-{job}.*")))

    def job(self, job: str) -> dict[str, str]:
        return dict(re.findall(r"(\w+)=(\S*)", self.call("scontrol", "show", "job", job)))

    def wait(self, job: str, until: Callable[[], bool], seconds: float = 600) -> None:
        ends = time.monotonic() + seconds
        while not until():
            assert time.monotonic() < ends, f"not in {seconds} s: {self.job(job)}\n{self.log(job)}"
            time.sleep(0.1)

    def finish(self, job: str, seconds: float = 600) -> dict[str, str]:
        """Waits for the end of a job, requeues included; returns what SLURM knows of it."""
        self.wait(job, lambda: not self.call("squeue", "-h", "-j", job), seconds)
        return self.job(job)
