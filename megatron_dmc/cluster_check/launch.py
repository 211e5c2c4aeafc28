"""Starts the processes of a cluster check, once for all layouts; again without a layout that broke them."""

import contextlib
import os
import shutil
import socket
import subprocess
import sys
from collections.abc import Sequence
from pathlib import Path

from megatron_dmc.cluster_check.cases import Case, run_folder, write_data
from megatron_dmc.cluster_check.layouts import REFERENCE, Layout
from megatron_dmc.errors import DMCError

WORKER = ("-m", "megatron_dmc.cluster_check.worker")
# What the processes print. A folder that holds this file was made by a check.
LOG = "cluster_check.log"


class CheckError(DMCError, RuntimeError):
    """The check itself could not be made. The message says why."""


def clear_folder(folder: Path) -> None:
    """Makes an empty folder; removes an earlier check there, and nothing else.

    Raises:
        CheckError: the folder holds other files, or cannot be written.
    """
    try:
        if folder.is_dir() and any(folder.iterdir()):
            if not (folder / LOG).is_file():
                raise CheckError(
                    f"--folder {folder} holds other files than a check's; remove them, or name a new folder"
                )
            shutil.rmtree(folder)
        folder.mkdir(parents=True, exist_ok=True)
        (folder / LOG).touch()
    except OSError as error:
        raise CheckError(f"--folder {folder} cannot be written: {error.strerror}; name another") from None


def run_layouts(
    folder: Path,
    layouts: Sequence[Layout],
    cases: Sequence[Case],
    most_processes: int,
    worker: Sequence[str] = WORKER,
) -> dict[tuple[str, str], str]:
    """Leaves a ``result.json`` in the folder of every run that came to its end.

    Args:
        layouts: that fit on this machine; the reference among them.
        worker: what each process runs; another one than this project's own in tests.

    Returns:
        Why the others did not, by the names of layout and case.

    Raises:
        CheckError: the processes did not start, or the reference itself failed.
    """
    folder.mkdir(parents=True, exist_ok=True)
    write_data(folder)
    failures: dict[tuple[str, str], str] = {}
    pending = list(layouts)
    while pending:
        log = folder / LOG
        if _start(folder, pending, cases, most_processes, worker, log) == 0:
            break
        broken = {
            (layout.name, case.name): _reason(run_folder(folder, case, layout), log)
            for layout in pending
            for case in cases
            if (folder_ := run_folder(folder, case, layout)).exists() and not (folder_ / "result.json").exists()
        }
        if not broken or any(name == REFERENCE for name, _ in broken):
            raise CheckError(f"the check did not run: {next(iter(broken.values()), _last_line(log))}; see {log}")
        failures |= broken
        pending = [layout for layout in pending if layout.name not in {name for name, _ in broken}]
    return failures


def _start(
    folder: Path,
    layouts: Sequence[Layout],
    cases: Sequence[Case],
    most_processes: int,
    worker: Sequence[str],
    log: Path,
) -> int:
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        port = probe.getsockname()[1]
    processes = max(layout.processes for layout in layouts)
    command = [sys.executable, "-m", "torch.distributed.run", f"--nproc-per-node={processes}", f"--master-port={port}"]
    command += [*worker, str(folder), "--most-processes", str(most_processes)]
    command += ["--layouts", *(layout.name for layout in layouts), "--cases", *(case.name for case in cases)]
    environment = {"OMP_NUM_THREADS": "1", "CUDA_DEVICE_MAX_CONNECTIONS": "1", **os.environ, "PYTHONWARNINGS": "ignore"}
    # A group of its own: Ctrl-C reaches torchrun through this process alone, once.
    with (
        open(log, "a") as file,
        subprocess.Popen(command, env=environment, stdout=file, stderr=file, process_group=0) as torchrun,
    ):
        try:
            return torchrun.wait()
        except KeyboardInterrupt:
            # torchrun ends its workers on SIGTERM; killed, it would leave them running.
            torchrun.terminate()
            with contextlib.suppress(KeyboardInterrupt):
                torchrun.wait()
            raise


def _reason(run: Path, log: Path) -> str:
    errors = sorted(run.glob("error-*"), key=lambda path: path.stat().st_mtime)
    return " ".join(errors[0].read_text().split()) if errors else f"a process ended without a word; see {log}"


def _last_line(log: Path) -> str:
    lines = [line for line in log.read_text(errors="replace").splitlines() if line.strip()]
    return lines[-1] if lines else "nothing was written"
