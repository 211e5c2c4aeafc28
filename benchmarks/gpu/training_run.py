"""The product's own training loop on this card: cluster_check with one process, as a process of its own."""

import importlib.util
import os
import signal
import subprocess
import sys
import tempfile
import time
from collections.abc import Sequence
from contextlib import suppress
from pathlib import Path

from gpu.run import Run

# What training imports beyond torch, megatron-core, numpy and omegaconf.
NEEDED = ("psutil", "rich", "safetensors", "tokenizers")
CASE, LAYOUT = "projection", "full recompute"
GRACE = 15.0  # seconds that the processes have to end after being asked to
ROOT = Path(__file__).resolve().parents[2]


def cluster_check(run: Run) -> None:
    """A few optimizer steps from a recipe, data and a checkpoint, with recomputation and without: both must say the same.

    Raises:
        RuntimeError: the check found a difference or broke.
        TimeoutError: it took longer than what was left of the budget.
    """
    missing = [name for name in NEEDED if importlib.util.find_spec(name) is None]
    if missing:
        run.row("skipped", name="cluster_check", reason=f"needs {', '.join(missing)}, not installed here")
        return
    with tempfile.TemporaryDirectory() as folder:
        arguments = ["--folder", f"{folder}/runs", "--layouts", LAYOUT, "--cases", CASE]
        output = Path(folder) / "output"
        status = run_limited(
            [sys.executable, "-m", "megatron_dmc.cluster_check", *arguments], output, run.left() - GRACE
        )
        said = output.read_text(errors="replace")[-2000:]
        log = Path(folder) / "runs" / "cluster_check.log"
        if status != 0 and log.is_file():
            said += log.read_text(errors="replace")[-4000:]
        run.row("note", cluster_check=status, said=said)
    if status is None:
        raise TimeoutError("cluster_check was stopped at the end of the budget")
    if status != 0:
        raise RuntimeError(f"cluster_check ended with {status}: {said.strip().splitlines()[-1:]}")


def run_limited(command: Sequence[str], output: Path, seconds: float) -> int | None:
    """The exit status; None: it was stopped after ``seconds``, with the processes that it had started."""
    environment = {**os.environ, "PYTHONPATH": os.pathsep.join([str(ROOT), os.environ.get("PYTHONPATH", "")])}
    with output.open("w") as file:
        # A session of its own, so that one signal reaches all of its processes.
        process = subprocess.Popen(command, stdout=file, stderr=file, env=environment, start_new_session=True)
    try:
        return process.wait(max(seconds, 1.0))
    except subprocess.TimeoutExpired:
        return None
    finally:
        _end_session(process)


def _end_session(process: subprocess.Popen) -> None:
    """Asks first: torchrun's workers are in sessions of their own, and it ends them before itself if it is not killed."""
    with suppress(ProcessLookupError):
        if process.poll() is None:
            os.killpg(process.pid, signal.SIGTERM)
            end = time.monotonic() + GRACE
            while time.monotonic() < end:
                process.poll()
                os.killpg(process.pid, 0)  # fails when the last one is gone
                time.sleep(0.1)
        os.killpg(process.pid, signal.SIGKILL)
    process.wait()
