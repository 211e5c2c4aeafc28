"""Ways to the same compression ratio side by side, on a small model, for equally many tokens.

Every row is one command over a recipe of examples/quickstart; what is done is not done again.
"""

import json
import os
import subprocess
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor, as_completed
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeElapsedColumn, TimeRemainingColumn

from megatron_dmc.errors import Terminated
from megatron_dmc.experiments.places import checkout
from megatron_dmc.experiments.recipes import report
from megatron_dmc.experiments.small_run import CommandFailed, SmallRun
from megatron_dmc.files import write_whole

RATIOS = (4, 8)
SWEEP_RATIOS = (2, 4, 8)
WINDOWS = (1, 4, 16, 64)
SEEDS = (1, 2)  # in addition to the recipes' own
SEQUENCE_LENGTH = 512


@dataclass(frozen=True)
class Row:
    """One retrofit: a recipe of examples/quickstart, and what differs from it."""

    recipe: str
    ratio: int
    local_window: int = 0
    operation: str = "merge"
    seed: int = 0

    @property
    def name(self) -> str:
        seed = f"-seed{self.seed}" if self.seed else ""
        return f"{self.recipe}-{self.operation}-w{self.local_window}-cr{self.ratio}{seed}"

    @property
    def overrides(self) -> list[str]:
        values = {
            "dmc.target_compression_ratio": self.ratio,
            "dmc.local_window": self.local_window,
            "dmc.operation": self.operation,
            "checkpoint.directory": f"checkpoints/{self.name}",
            "checkpoint.save_every_integer_ratio": "false",
            "monitor.tensorboard": f"tensorboard/{self.name}",
            "monitor.progress_bar": "false",
        }
        if self.seed:
            values |= {"dmc.seed": self.seed, "data.seed": self.seed, "training.seed": self.seed}
        return [f"{name}={value}" for name, value in values.items()]


def rows() -> list[Row]:
    """The comparison, then the seeds, then what is left of the sweep over windows."""
    made: dict[str, Row] = {}
    for ratio in RATIOS:
        compared = [Row("neuron", ratio), Row("recipe", ratio)]
        compared += [
            Row(recipe, ratio, 16, operation) for recipe in ("recipe", "adapter") for operation in ("merge", "evict")
        ]
        made |= {row.name: row for row in compared}
    for ratio in RATIOS:
        for seed in SEEDS:
            for operation in ("merge", "evict"):
                row = Row("recipe", ratio, 16, operation, seed)
                made[row.name] = row
    for ratio in SWEEP_RATIOS:
        for window in (0, *WINDOWS):
            for operation in ("merge", "evict") if window else ("merge",):
                row = Row("recipe", ratio, window, operation)
                # The ring alone is more than the target allows.
                if window * ratio < SEQUENCE_LENGTH:
                    made[row.name] = row
    return list(made.values())


def smoke_rows() -> list[Row]:
    return [Row("neuron", 4), Row("recipe", 4, 16, "merge"), Row("adapter", 4, 16, "evict")]


class Comparison(SmallRun):
    """Rows are trained several at a time, each on its share of the cores."""

    jobs = max(1, min(os.cpu_count() or 1, 8))

    def __init__(self, folder: Path, data: str | None, smoke: bool) -> None:
        super().__init__(folder, data, smoke)
        self._running: set[subprocess.Popen[str]] = set()

    def run(self, wanted: list[Row]) -> dict[str, Any]:
        """{name: measurements} of base, control and all rows."""
        self.prepare_text()
        for name in ("base", "control"):
            self.stage(f"training: {name}.yaml", f"checkpoints/{name}/final", self.training(name))
        measured = {name: self._measured(name) for name in ("base", "control")}
        columns = (
            TextColumn("{task.description}"),
            BarColumn(),
            MofNCompleteColumn(),
            TimeElapsedColumn(),
            TimeRemainingColumn(elapsed_when_finished=True),
        )
        with Progress(*columns) as progress:
            task = progress.add_task("retrofits", total=len(wanted))
            for row, found in self._done(wanted):
                measured[row.name] = {"row": vars(row), **found}
                over = found["loss_per_byte"] - measured["control"]["loss_per_byte"]
                progress.console.print(
                    f"{row.name:32} CR {found['compression_ratio']:5.2f}  nats/byte over control {over:+.4f}  "
                    f"{found['cache_bytes'] / 1024:.0f} KiB"
                )
                progress.advance(task)
        return {name: measured[name] for name in ("base", "control", *(row.name for row in wanted))}

    def _done(self, wanted: list[Row]) -> Iterator[tuple[Row, dict[str, Any]]]:
        """Rows and their measurements, in the order in which they are done."""
        pool = ThreadPoolExecutor(self.jobs)
        try:
            futures = {pool.submit(self._train_and_measure, row): row for row in wanted}
            for future in as_completed(futures):
                yield futures[future], future.result()
        except Terminated:
            pool.shutdown(wait=False, cancel_futures=True)
            for process in list(self._running):
                process.terminate()
            raise
        finally:
            pool.shutdown(cancel_futures=True)

    def _train_and_measure(self, row: Row) -> dict[str, Any]:
        if not (self.folder / "checkpoints" / row.name / "final").exists():
            self._quietly(self.training(row.recipe, row.overrides))
        return self._measured(row.name)

    def _measured(self, name: str) -> dict[str, Any]:
        path = self.folder / "results" / f"{name}.json"
        if not path.exists():
            path.parent.mkdir(exist_ok=True)
            write_whole(path, self._quietly(["measure", f"{name}/final", *["--smoke"] * self.smoke]))
        return json.loads(path.read_text())

    def _quietly(self, words: list[str]) -> str:
        """What ``megatron-dmc`` prints with these words. Raises CommandFailed with what it says when it fails."""
        environment = {**self.environment, "OMP_NUM_THREADS": str(max(1, (os.cpu_count() or 1) // self.jobs))}
        command = self.process(words)
        pipe = subprocess.PIPE
        with subprocess.Popen(
            command, cwd=self.folder, env=environment, stdout=pipe, stderr=pipe, text=True
        ) as process:
            self._running.add(process)
            try:
                printed, said = process.communicate()
            except Terminated:
                process.terminate()
                raise
            finally:
                self._running.discard(process)
        if process.returncode:
            said = said.strip() or f"{' '.join(command)} failed and said nothing"
            # A line of ours says it all; of anything else the traceback is wanted.
            *_, last = said.splitlines()
            raise CommandFailed(last.partition(": ")[2] if last.startswith("megatron-dmc: ") else said)
        return printed


def run_recipes(folder: Path, smoke: bool) -> None:
    """Runs the comparison in ``folder``. In a source checkout the full one writes examples/recipes/results.json and
    docs/small_model.md's tables; results.json lies in ``folder`` and the tables are printed elsewhere.

    Raises:
        ConfigError: the folder holds a run on other text.
        CommandFailed: a row did not finish.
    """
    results = Comparison(folder, None, smoke).run(smoke_rows() if smoke else rows())
    root = None if smoke else checkout()
    target = folder if root is None else root / "examples" / "recipes"
    write_whole(target / "results.json", json.dumps(results, indent=1))
    if root is not None:
        report.write(results, root / "docs")
    if not smoke:
        print(report.table(results), report.sweep(results), sep="\n\n")
