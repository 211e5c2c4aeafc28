"""Ways to the same compression ratio side by side, on a real model: what a decision does, and how late it takes effect.

Every row is calibrated and trained by the recipes of examples/smollm2 on equally many tokens; only the settings of its name
differ.
"""

import json
from collections.abc import Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

from megatron_dmc.evaluation.exported.evaluate import recall_over_base
from megatron_dmc.experiments.places import checkout
from megatron_dmc.experiments.real_model.retrofits import Retrofit
from megatron_dmc.experiments.real_model.run import Options, RealModelRun
from megatron_dmc.experiments.real_model.summary import BASE, read_measured, read_retrofit
from megatron_dmc.experiments.recipes import real_report
from megatron_dmc.experiments.stages import Clock, Stage, remove
from megatron_dmc.files import write_whole

RATIOS = (4, 8)
WINDOWS = (32, 64, 16)
# With the recipes' own window, of all operations.
WINDOW, OTHERS = 64, ("evict", "merge")
SEEDS = (1234, 1, 2)
# A third of what the recipes take, and two thirds: eight hours for all rows and seeds instead of a day.
TOKENS = 65_536
CALIBRATION_STEPS = 16


@dataclass(frozen=True)
class Form:
    """One row, or one of its seeds."""

    ratio: int
    operation: str
    local_window: int
    seed: int

    @property
    def name(self) -> str:
        return f"{self.operation}-w{self.local_window}-cr{self.ratio}-seed{self.seed}"

    @property
    def retrofits(self) -> tuple[Retrofit, Retrofit]:
        """The calibration that it starts from, and itself."""
        settings = (
            f"dmc.target_compression_ratio={self.ratio}",
            f"dmc.operation={self.operation}",
            f"dmc.local_window={self.local_window}",
            f"data.seed={self.seed}",
            "monitor.eval_samples=0",
        )
        start = f"{self.name}-start"
        return (
            Retrofit(start, "calibrate", settings, scaled=False, evaluated=False, steps=CALIBRATION_STEPS),
            Retrofit(self.name, "train", (*settings, f"checkpoint.load_base=checkpoints/{start}/final")),
        )


def forms() -> list[Form]:
    """Every row with the first seed, then with the others."""
    pairs = [*(("absorb", window) for window in WINDOWS), *((operation, WINDOW) for operation in OTHERS)]
    return [Form(ratio, *pair, seed) for seed in SEEDS for pair in pairs for ratio in RATIOS]


def smoke_forms() -> list[Form]:
    return [Form(4, "evict", 8, 1)]


class RealComparison(RealModelRun):
    """Rows one after the other; of each only the checkpoints and the report are kept."""

    def __init__(self, folder: Path, options: Options, wanted: Sequence[Form]) -> None:
        super().__init__(folder, options, [each for form in wanted for each in form.retrofits])
        self.forms, self.exports_at_once = wanted, 1

    def _identity(self) -> dict[str, Any]:
        return {**super()._identity(), "comparison": True}

    def result_stages(self) -> list[Stage]:
        stages = [self.base_evaluation_stage()]
        for form in self.forms:
            start, trained = form.retrofits
            stages += [self.retrofit_stage(start), self.retrofit_stage(trained)]
            # An export is only for its evaluation.
            export = replace(self.export_stage(trained), serves=(self.report(trained.name),))
            stages += [export, self.evaluation_stage(trained)]
        return stages

    def _report(self, name: str) -> Path:
        return self.folder / self.report(name)

    def _do(self, stage: Stage, clock: Clock) -> None:
        super()._do(stage, clock)
        for form in self.forms:
            if self.folder / stage.makes == self._report(form.name):
                remove(self.folder / f"hf-{form.name}")
                write_whole(self.folder / "results.json", json.dumps(self.results(), indent=1) + "\n")

    def results(self) -> dict[str, Any]:
        """The base and the rows that are measured so far, as plain values; see ``real_report``."""

        base = read_measured(self._report(BASE))

        def read(name: str) -> dict[str, Any]:
            report = base if name == BASE else read_retrofit(self._report(name), base)
            found: dict[str, Any] = {name: report[name] for name in ("loss", "kl", "copying", "dmc") if name in report}
            if "dmc" in found:
                found["compression_ratio"] = report["serving"][0]["compression_ratio"]
                found["recall_over_base"] = recall_over_base(report)
            return found

        return {
            "base": read(BASE),
            "tokens": max(self.budget.read_tokens(each, self.recipes) for each in self.retrofits if each.scaled),
            "rows": [{**vars(form), **read(form.name)} for form in self.forms if self._report(form.name).exists()],
        }


def compare_on_real_model(folder: Path, model: str, data: str | None, smoke: bool) -> None:
    """Runs the comparison in ``folder``, where ``results.json`` grows row by row. In a source checkout the full one with
    smollm2 and the default text writes examples/recipes/smollm2.json and its section of docs/choosing.md.

    Raises:
        ConfigError: a bad model, text or folder.
        CommandFailed: a row did not finish.
    """
    options = Options(model, data, tokens=None if smoke else TOKENS, smoke=smoke, brief=not smoke)
    run = RealComparison(folder, options, smoke_forms() if smoke else forms())
    run.run()
    results = run.results()
    root = checkout()
    if root is not None and run.source.package is not None and data is None and not smoke:
        write_whole(root / "examples" / "recipes" / "smollm2.json", json.dumps(results, indent=1) + "\n")
        real_report.write(results, root / "docs")
    print(real_report.table(results))
