"""The first minutes on a GPU: numbers, speed, memory and host waits of every operation, the most telling first.

    PYTHONPATH=. python benchmarks/gpu_check.py [--out FOLDER] [--budget SECONDS] [--parts NAME,NAME] [--toy]

Needs torch, megatron-core, numpy and omegaconf. Each row is on the disk as soon as it is made, and no part stops the next.
Without a CUDA device it says so and exits 0; it exits 1 when an error bound was exceeded or a part failed.
``--toy`` runs all parts on the CPU at toy size, to check the check.
"""

import argparse
import datetime
import faulthandler
import importlib
import json
import os
import signal
import sys
import warnings
from collections.abc import Callable, Sequence

import common
import torch
from gpu import summary
from gpu.environment import card, environment
from gpu.run import ROWS, DeviceLostError, Part, Run
from gpu.sizes import FULL, TOY

from megatron_dmc.cli.common import Parser, output_folder
from megatron_dmc.config import ConfigError, Range


def later(module: str, function: str) -> Callable[[Run], None]:
    """A part whose module is imported when the part begins: a package that is broken here stops no other part."""
    return lambda run: getattr(importlib.import_module(f"gpu.{module}"), function)(run)


# The most telling first, the riskiest last.
PARTS = (
    Part("environment", environment, 0),
    Part("numbers", later("numbers", "numbers"), 20),
    Part("noise", later("numbers", "noise"), 2),
    Part("decode", later("numbers", "decode"), 40),
    Part("speed", later("speed", "speed"), 30),
    Part("step", later("step", "step"), 15),
    Part("step-numbers", later("step", "step_numbers"), 5),
    Part("decode-speed", later("speed", "decode_speed"), 5),
    Part("cluster-check", later("training_run", "cluster_check"), 60),
)
TOY_PARTS = 20  # a part takes so many times less at toy size
# A kernel that never returns can not be interrupted: the process is ended so many seconds after the budget.
PATIENCE = 60
MOST_SECONDS = 7 * 24 * 3600


def run_parts(run: Run, parts: Sequence[Part]) -> list[Part]:
    """Runs the parts in turn. Returns those that are left because the GPU was lost to this process."""
    for number, part in enumerate(parts):
        try:
            run.part(part)
        except DeviceLostError:
            return list(parts[number + 1 :])
    return []


def main(arguments: Sequence[str] | None = None, parts: Sequence[Part] = PARTS) -> int:
    options = _options(arguments, parts)
    # megatron-core warns of every optional package that is not there, when it is imported.
    warnings.filterwarnings("ignore", module=r"megatron\.core")
    if options.toy:  # before the first CUDA call: megatron-core builds on a GPU where it sees one
        os.environ["CUDA_VISIBLE_DEVICES"] = ""
    elif not torch.cuda.is_available():
        print("gpu-check: no CUDA device here, nothing was checked")
        return 0
    if (options.out / ROWS).exists() and not options.go_on:
        print(f"gpu-check: --out {options.out} holds the rows of another check; name another folder", file=sys.stderr)
        return 2
    if options.out.is_dir() and any(options.out.iterdir()) and not (options.out / ROWS).exists():
        print(f"gpu-check: --out {options.out} holds other files than a check's; name a new folder", file=sys.stderr)
        return 2
    device, sizes = ("cpu", TOY) if options.toy else ("cuda", FULL)
    if options.toy:
        parts = [Part(part.name, part.function, part.least / TOY_PARTS) for part in parts]
    chosen = [part for part in parts if options.parts is None or part.name in options.parts]
    os.environ.setdefault("KINETO_LOG_LEVEL", "9")  # torch's profiler prints a line whenever it starts and stops
    name = card(device)
    run = Run(options.out, device, sizes, options.budget)
    faulthandler.dump_traceback_later(options.budget + PATIENCE, exit=True, file=sys.__stderr__)
    try:
        left = run_parts(run, chosen)
        if left:
            _go_on(options, left, run.left())
    finally:
        faulthandler.cancel_dump_traceback_later()
        result = summary.summary(name, summary.read_rows(options.out))
        (options.out / "summary.json").write_text(json.dumps(result, indent=1) + "\n", encoding="utf-8")
        print("\n" + summary.text(result))
        print("written:", options.out)
    return 1 if result["failed"] else 0


def _options(arguments: Sequence[str] | None, parts: Sequence[Part]) -> argparse.Namespace:
    names = [part.name for part in parts]
    parser = Parser(description=__doc__.splitlines()[0])
    parser.add_argument(
        "--out", type=output_folder, help="where rows.jsonl and summary.json go (default: a new folder in results/)"
    )
    parser.add_argument("--budget", type=float, default=240, metavar="SECONDS", help="default: %(default)s")
    parser.add_argument("--parts", type=lambda x: x.split(","), metavar="NAME,NAME", help=f"of: {','.join(names)}")
    parser.add_argument("--toy", action="store_true", help="on the CPU at toy size")
    parser.add_argument("--go-on", action="store_true", help="add to the rows that --out holds")
    options = parser.parse_args(arguments)
    try:
        Range(0, MOST_SECONDS).check("--budget", options.budget)
    except ConfigError as error:
        parser.error(str(error))
    if unknown := sorted(set(options.parts or ()) - set(names)):
        parser.error(f"--parts {','.join(unknown)}: no such part; there are {','.join(names)}")
    if options.out is None:
        options.out = common.RESULTS / f"gpu_check-{datetime.datetime.now():%Y-%m-%d-%H%M%S}"
    return options


def _go_on(options: argparse.Namespace, parts: Sequence[Part], seconds: float) -> None:
    """The parts that are left, in a new process in this one's place: it has a CUDA context of its own."""
    names = ",".join(part.name for part in parts)
    print("gpu-check: the GPU is lost to this process, a new one goes on", flush=True)
    arguments = ["--out", str(options.out), "--budget", str(max(seconds, 0)), "--parts", names, "--go-on"]
    os.execv(sys.executable, [sys.executable, __file__, *arguments, *(["--toy"] if options.toy else [])])


if __name__ == "__main__":
    # Whoever stops it gets the summary of what was done. Under nohup it goes on without its terminal.
    for ending in (signal.SIGTERM, signal.SIGHUP):
        if signal.getsignal(ending) != signal.SIG_IGN:
            signal.signal(ending, lambda number, _: sys.exit(128 + number))
    try:
        sys.exit(main())
    except KeyboardInterrupt:
        print("gpu-check: interrupted", file=sys.stderr)
        sys.exit(130)
