"""What the benchmarks share: interleaved timing, peak memory in a process of its own, and a results file."""

import argparse
import datetime
import json
import os
import platform
import statistics
import subprocess
import sys
import time
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

import torch

RESULTS = Path(__file__).parent / "results"


def machine(device: str = "cpu") -> dict[str, Any]:
    """What the numbers were measured on."""
    described = {
        "processor": _processor(),
        "vectors": torch.backends.cpu.get_cpu_capability(),
        "cores": os.cpu_count(),
        "threads": torch.get_num_threads(),
        "python": platform.python_version(),
        "torch": torch.__version__,
        "date": datetime.date.today().isoformat(),
    }
    if device == "cuda":
        described["gpu"] = torch.cuda.get_device_name()
    return described


def _processor() -> str:
    try:
        lines = Path("/proc/cpuinfo").read_text(encoding="utf-8").splitlines()
    except OSError:
        return platform.processor()
    return next((line.split(":", 1)[1].strip() for line in lines if line.startswith("model name")), platform.machine())


def add_operation_options(parser: argparse.ArgumentParser) -> None:
    """Sizes at which a single operation is measured."""
    parser.add_argument("--seq", type=int, nargs="+", default=[1024, 2048, 4096, 8192, 16384])
    parser.add_argument("--heads", type=int, default=8)
    parser.add_argument("--head-dim", type=int, default=64)


def add_timing_options(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("--rounds", type=int, default=7)
    # More than OpenMP was started with wait actively for each other, which takes a step several times its processor time.
    parser.add_argument(
        "--threads",
        type=int,
        default=torch.get_num_threads(),
        help="at most OMP_NUM_THREADS, which says how many by default",
    )
    parser.add_argument(
        "--clock", choices=CLOCKS, default="wall", help="cpu: processor time, for one thread on a busy machine"
    )


CLOCKS: dict[str, Callable[[], float]] = {"wall": time.perf_counter, "cpu": time.process_time}


def interleaved_seconds(
    functions: Mapping[str, Callable[[], object]],
    rounds: int,
    clock: str = "wall",
    synchronize: Callable[[], None] | None = None,
) -> dict[str, list[float]]:
    """Seconds of every call; each round calls all functions once, so that a busy moment meets all of them.

    One round before the first is not counted.
    """
    now, wait = CLOCKS[clock], synchronize or (lambda: None)
    seconds: dict[str, list[float]] = {name: [] for name in functions}
    for counted in [False] + [True] * rounds:
        for name, function in functions.items():
            wait()
            begin = now()
            function()
            wait()
            if counted:
                seconds[name].append(now() - begin)
    return seconds


def ratio_to(base: str, seconds: dict[str, list[float]]) -> dict[str, float]:
    """Median over the rounds of every function's time over the base's in the same round."""
    return {
        name: statistics.median(t / b for t, b in zip(times, seconds[base], strict=True))
        for name, times in seconds.items()
    }


def median_ms(seconds: Sequence[float]) -> float:
    return 1000 * statistics.median(seconds)


def peak_growth(function: Callable[[], object]) -> int:
    """Bytes by which the call's peak of resident memory exceeds what was resident before it. Linux.

    Not ru_maxrss: a child process inherits its parent's.
    """
    Path("/proc/self/clear_refs").write_text("5", encoding="ascii")  # the peak starts anew
    before = _resident("VmRSS")
    function()
    return _resident("VmHWM") - before


def _resident(name: str) -> int:
    lines = Path("/proc/self/status").read_text(encoding="ascii").splitlines()
    return next(1024 * int(line.split()[1]) for line in lines if line.startswith(f"{name}:"))


# glibc keeps large freed blocks once it has seen one; with a fixed threshold a freed tensor is gone at once.
FREES_AT_ONCE = {"MALLOC_MMAP_THRESHOLD_": "65536"}


def in_own_process(script: str, arguments: Sequence[str], environment: Mapping[str, str] = FREES_AT_ONCE) -> str:
    """The last line that ``script`` prints when it is run with ``arguments``; environment: beside this process's."""
    done = subprocess.run(
        [sys.executable, script, *arguments], capture_output=True, text=True, env={**os.environ, **environment}
    )
    if done.returncode:
        raise RuntimeError(f"{Path(script).name} {' '.join(arguments)} failed:\n{done.stderr}")
    return done.stdout.splitlines()[-1]


def report(name: str, title: str, rows: Sequence[dict[str, Any]], **settings: Any) -> None:
    """Prints the rows and writes them, with the settings they were measured at."""
    print(title)
    print_table(rows)
    print("written:", write_results(name, rows, **settings))


def print_table(rows: Sequence[dict[str, Any]]) -> None:
    print("\n".join(table_lines(rows)))


def table_lines(rows: Sequence[dict[str, Any]]) -> list[str]:
    """Rows as aligned columns, one for every key; a dash for None and for what a row does not have."""
    header = list(dict.fromkeys(name for row in rows for name in row))
    cells = ((row.get(name) for name in header) for row in rows)
    lines = [header] + [["-" if value is None else _shown(value) for value in row] for row in cells]
    widths = [max(len(line[column]) for line in lines) for column in range(len(header))]
    return ["  ".join(cell.rjust(width) for cell, width in zip(line, widths, strict=True)) for line in lines]


def _shown(value: Any) -> str:
    return f"{value:.3g}" if isinstance(value, float) else str(value)


def write_results(name: str, rows: Sequence[dict[str, Any]], device: str = "cpu", **settings: Any) -> Path:
    """benchmarks/results/<name>.json with the machine, the settings and the rows."""
    RESULTS.mkdir(exist_ok=True)
    path = RESULTS / f"{name}.json"
    content = {"machine": machine(device), "settings": settings, "rows": list(rows)}
    path.write_text(json.dumps(content, indent=2) + "\n", encoding="utf-8")
    return path
