"""Runs a comparison: base and text, what needs no training, then each training with the rows that are measured on it."""

import importlib.util
import json
import os
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import yaml
from rich.console import Console

from megatron_dmc.baselines.presses import OF_KVPRESS
from megatron_dmc.config import ConfigError
from megatron_dmc.evaluation.exported.evaluate import recall_over_base
from megatron_dmc.experiments.compare import page
from megatron_dmc.experiments.compare.ground import Ground, export_of, own_ground, real_ground, shipped, small_ground
from megatron_dmc.experiments.compare.rows import AT_THRESHOLD, CODED, LABELS, METHODS, Row, Wanted, possible_groups
from megatron_dmc.experiments.compare.trainings import Training, Trainings
from megatron_dmc.experiments.places import checkout, comparison_recipes
from megatron_dmc.experiments.real_model.summary import read_measured
from megatron_dmc.experiments.small_run import read_object
from megatron_dmc.experiments.stages import Clock, Stage, StagedRun, read_stages, remove
from megatron_dmc.files import write_whole
from megatron_dmc.recipe import load_recipe
from megatron_dmc.report.readers.reports import MODEL
from megatron_dmc.report.write import PAGE

RESULTS = "comparison.json"
EVALUATION = "evaluation/"
BASE = f"{EVALUATION}base.json"
RULER = "ruler/"
RULER_LENGTHS = (1024, 2048)
# Of the training part, which an export's curve is measured on.
_CURVE_TEXTS = 2
_SIZES = MODEL[1:]  # without its name


class Comparison(StagedRun):
    """A folder, the base and the rows that are measured there."""

    def __init__(self, ground: Ground, wanted: Wanted) -> None:
        super().__init__(ground.run.folder, ground.run.data, ground.run.smoke)
        self.recipes = comparison_recipes()
        self.ground, self.wanted = ground, wanted
        self.trainings = Trainings(ground.recipe, shipped("dms"), shipped("gqa"))
        # Known once the base is there.
        self.rows: list[Row] = []
        self._presses = _presses_folder() if set(wanted.methods) & set(OF_KVPRESS) else None

    @property
    def environment(self) -> dict[str, str]:
        return self.ground.run.environment

    def process(self, words: Sequence[str]) -> list[str]:
        command = super().process(words)
        if self._presses is None or not set(words) & set(OF_KVPRESS):
            return command
        before = [path for path in (os.environ.get("PYTHONPATH"),) if path]
        return ["env", f"PYTHONPATH={os.pathsep.join([str(self._presses), *before])}", *command]

    def run(self) -> None:
        """Every stage that is not done, with the time that is left; results are written after each row.

        Raises:
            ConfigError: a bad text or folder, or a row that cannot be; before anything is compressed.
            CommandFailed: a stage did not finish; its process has said why.
        """
        self.ground.run.prepare_text()
        ruler = [self._ruler_stage("base", "hf-base")] if self.wanted.ruler else []
        self._do_all([*self.ground.stages, self._base_stage(), *ruler])
        self.rows = self.wanted.rows(self.trainings, self._groups())
        self._write_recipes()
        self._do_all(self._row_stages())

    def _do_all(self, stages: Sequence[Stage]) -> None:
        clock = Clock([stage for stage in stages if not self._is_done(stage)])
        for stage in stages:
            is_new = not self._is_done(stage)
            self._do(stage, clock)
            if is_new and stage.makes.startswith((EVALUATION, RULER)):
                write_whole(self.folder / RESULTS, json.dumps(self.results(), indent=1) + "\n")
                self._remove_exports()
                # It shows fewer rows.
                (self.folder / PAGE).unlink(missing_ok=True)

    def _remove_exports(self) -> None:
        """Those of trained rows that have all been measured, since each may be as large as the base; but for one of DMC, which
        the report shows."""
        waiting = {row.export for row in self.rows for path in self._reports(row) if not (self.folder / path).exists()}
        kept = max((row for row in self.rows if row.method == "dmc"), key=lambda row: row.ratio, default=None)
        waiting |= set() if kept is None else {kept.export}
        for export in {row.export for row in self.rows if row.training is not None} - waiting:
            remove(self.folder / export)

    def _groups(self) -> dict[float, int]:
        if "gqa" not in self.wanted.methods:
            return {}
        heads = self._config()["num_key_value_heads"]
        found = possible_groups(heads, max(self.wanted.ratios))
        if not found:
            print(
                f"gqa: {heads} KV heads cannot be averaged to a ratio of at most {max(self.wanted.ratios):g}; left out"
            )
        return found

    def _config(self) -> dict[str, Any]:
        folder = self.folder / "hf-base"
        return read_object(folder / "config.json", *_SIZES, remedy=f"remove {folder}")

    def _base_stage(self) -> Stage:
        words = ["evaluate", "hf-base", "--text", self.ground.heldout, "--output", BASE, "--amount", self.ground.amount]
        return Stage("evaluation: base", BASE, words, 200)

    def _row_stages(self) -> list[Stage]:
        """Each training and export right before the first row that it serves."""
        stages: list[Stage] = []
        made: set[str] = set()
        for row in self.rows:
            for training in row.trainings:
                if training.name not in made:
                    stages += self._training_stages(training)
                    made.add(training.name)
            if row.training is not None and row.export not in made:
                stages.append(self._export_stage(row))
                made.add(row.export)
            if row.method == AT_THRESHOLD and f"ratios: {row.export}" not in made:
                stages.append(self._ratios_stage(row))
                made.add(f"ratios: {row.export}")
            stages.append(self._evaluation_stage(row))
            if self._reads_ruler(row):
                stages.append(self._ruler_stage(row.name, row.export, row.flags))
        return stages

    def _training_stages(self, training: Training) -> list[Stage]:
        name = training.name
        serves = tuple(path for row in self.rows if training in row.trainings for path in self._reports(row))
        stages = []
        if "dmc" not in training.recipe:
            stages += self._group_stages(training.recipe["checkpoint"]["load_base"], serves)
        seconds = training.tokens / (320 if _only_calibrates(training) else 140)
        words = ["retrofit", f"recipes/{name}.yaml"]
        return [*stages, Stage(f"training: {name}", f"checkpoints/{name}/final", words, seconds, serves=serves)]

    def _group_stages(self, checkpoint: str, serves: tuple[str, ...]) -> list[Stage]:
        """The base with its KV heads averaged, as a checkpoint."""
        name = Path(checkpoint).name
        heads = name.rpartition("-")[2]
        grouped = f"hf-{name}"
        return [
            Stage(
                f"heads: {name}", grouped, ["group-heads", "hf-base", grouped, "--kv-heads", heads], 10, serves=serves
            ),
            Stage(f"convert: {name}", checkpoint, ["convert-from-hf", grouped, checkpoint], 30, serves=serves),
        ]

    def _export_stage(self, row: Row) -> Stage:
        assert row.training is not None
        serves = tuple(path for each in self.rows if each.export == row.export for path in self._reports(each))
        return export_of(f"checkpoints/{row.training.name}/{row.checkpoint}", row.export, row.export, serves)

    def _ratios_stage(self, row: Row) -> Stage:
        """Finds an export's thresholds, for all rows that ask it for another ratio."""
        asking = [each for each in self.rows if each.export == row.export and each.method == AT_THRESHOLD]
        serves = tuple(path for each in asking for path in self._reports(each))
        length = self.ground.recipe["data"]["sequence_length"]
        words = [
            "ratios",
            row.export,
            "--text",
            self.ground.trained_text,
            "--tokens",
            str(length),
            "--texts",
            str(_CURVE_TEXTS),
        ]
        config = self.folder / row.export / "config.json"

        def is_measured() -> bool:
            return config.exists() and read_object(config).get("compression_curve") is not None

        return Stage(f"ratios: {row.export}", row.export, words, 240, serves=serves, is_done=is_measured)

    def _evaluation_stage(self, row: Row) -> Stage:
        report = self._report(row)
        words = ["evaluate", row.export, "--text", self.ground.heldout, "--base", BASE, "--output", report, *row.flags]
        return Stage(f"evaluation: {row.name}", report, words, 150)

    def _ruler_stage(self, name: str, export: str, flags: Sequence[str] = ()) -> Stage:
        words = ["evaluate", export, "--tasks", "dmc_ruler", "--length", ",".join(map(str, RULER_LENGTHS))]
        words += ["--limit", str(self.wanted.ruler), "--output", _ruler_report(name), *flags]
        return Stage(f"RULER: {name}", _ruler_report(name), words, 100 * self.wanted.ruler)

    def _report(self, row: Row) -> str:
        return f"{EVALUATION}{row.name}.json"

    def _reports(self, row: Row) -> tuple[str, ...]:
        """All that is measured of a row."""
        return (self._report(row), *([_ruler_report(row.name)] if self._reads_ruler(row) else []))

    def _reads_ruler(self, row: Row) -> bool:
        """Slots in codes are read in held-out text only."""
        return self.wanted.ruler > 0 and row.method not in CODED

    def _write_recipes(self) -> None:
        """One file for each training, which a user can run by hand; all are checked before the first is run."""
        folder = self.folder / "recipes"
        folder.mkdir(exist_ok=True)
        for training in {each.name: each for row in self.rows for each in row.trainings}.values():
            path, text = folder / f"{training.name}.yaml", yaml.safe_dump(training.recipe, sort_keys=False)
            begun = path.exists() and (self.folder / training.recipe["checkpoint"]["directory"]).exists()
            if begun and path.read_text(encoding="utf-8") != text:
                raise ConfigError(
                    f"{path} is of a comparison with other settings; name a new folder with --output, or remove this one"
                )
            write_whole(path, text)
            # What it starts from may not be there yet, and has the base's sizes.
            load_recipe(path, [f"checkpoint.load_base={self.folder / self.ground.base}"])

    def results(self) -> dict[str, Any]:
        """Base and rows that are measured so far, as plain values."""
        config = self._config()
        base = read_measured(self.folder / BASE)
        stages = read_stages(self.folder / "stages.json")
        seconds = {stage["stage"]: stage["seconds"] for stage in stages}
        rows = []
        for row in self.rows:
            if not (self.folder / self._report(row)).exists():
                continue
            report = read_measured(self.folder / self._report(row), base)
            taken = [seconds.get(f"training: {each.name}") for each in row.trainings]
            rows.append(
                {
                    "name": row.name,
                    "method": row.method,
                    "label": LABELS[row.method],
                    "ratio": row.ratio,
                    "seed": row.seed,
                    "trained_tokens": row.tokens,
                    "training_seconds": _seconds(taken, row.share),
                    "commands": self._commands(row),
                    "report": report,
                    "recall_over_base": recall_over_base(report),
                    **self._ruler(row.name),
                }
            )
        return {
            # A folder's own name: where it lies is nobody's business.
            "model": {"name": self.ground.name, **{name: config[name] for name in _SIZES}},
            "text": self._text_counts(base["heldout_tokens"]),
            "machine": base["machine"],
            "tokens": self.trainings.tokens,
            "base": {**base, **self._ruler("base")},
            "rows": rows,
            "stages": stages,
        }

    def _text_counts(self, heldout: int) -> dict[str, int]:
        """Tokens of both parts; of a text that was made elsewhere perhaps only of the one."""
        path = self.folder / f"{self.ground.trained_text}.json"
        counts = read_object(path) if path.exists() else {}
        trained = {"train_tokens": counts["tokens"]} if type(counts.get("tokens")) is int else {}
        return {**trained, "heldout_tokens": heldout}

    def _ruler(self, name: str) -> dict[str, Any]:
        """{"ruler": {length: mean score of its tasks}}; empty where it was not measured."""
        path = self.folder / _ruler_report(name)
        if not path.exists():
            return {}
        scores: dict[str, list[float]] = {}
        for row in read_object(path, "results")["results"]:
            scores.setdefault(str(row["length"]), []).append(row["value"])
        return {"ruler": {length: sum(found) / len(found) for length, found in scores.items()}}

    def _commands(self, row: Row) -> list[str]:
        """That made a row, in the run's folder."""
        stages = [stage for each in row.trainings for stage in self._training_stages(each)]
        stages += [] if row.training is None else [self._export_stage(row)]
        stages += [self._ratios_stage(row)] if row.method == AT_THRESHOLD else []
        works = [stage.work for stage in (*stages, self._evaluation_stage(row))]
        return [" ".join(["megatron-dmc", *work]) for work in works if not callable(work)]


def _ruler_report(name: str) -> str:
    return f"{RULER}{name}.json"


def _seconds(taken: Sequence[float | None], share: float) -> float | None:
    """Of a row's trainings, the last of them in part; None: nothing was trained, or it is not known how long it took."""
    known = [each for each in taken if each is not None]
    return sum(known[:-1]) + share * known[-1] if known and len(known) == len(taken) else None


def _only_calibrates(training: Training) -> bool:
    return all(phase["kind"] == "calibrate" for phase in training.recipe["phases"])


def _presses_folder() -> Path | None:
    """Where kvpress lies beside this environment; None: in it. Raises ConfigError: nowhere."""
    if importlib.util.find_spec("kvpress") is not None:
        return None
    root = checkout()
    if root is not None and (root / ".venv-kvpress" / "kvpress").is_dir():
        return root / ".venv-kvpress"
    raise ConfigError(
        f"the rows {', '.join(OF_KVPRESS)} need kvpress; run make kvpress, or leave them out: --methods dmc,calibrated,dms,gqa"
    )


@dataclass(frozen=True)
class Request:
    """What ``megatron-dmc compare`` was asked for.

    Attributes:
        recipe: a retrofit of the user's own; None: that of examples/compare.
        model: smollm2, a Hugging Face folder or a GGUF file; None: the recipe's base, or the quickstart's.
        data: text for the quickstart's base, or for ``model``.
        methods: of METHODS; None: all.
        ratios: None: as many as the model's comparison takes by itself.
        seeds: how many.
        ruler: texts of each of RULER's tasks and lengths; 0: none.
    """

    recipe: str | None = None
    model: str | None = None
    data: str | None = None
    methods: Sequence[str] | None = None
    ratios: Sequence[float] | None = None
    seeds: int = 3
    ruler: int = 0
    smoke: bool = False


def compare(folder: Path, request: Request) -> None:
    """Runs the comparison in ``folder``, where ``comparison.json`` grows row by row, and prints the table. In a source
    checkout the whole one with smollm2 and the default text writes examples/compare/smollm2.json and its section of
    docs/results.md.

    Raises:
        ConfigError: a bad recipe, model, text or folder, or a row that cannot be.
        CommandFailed: a row did not finish.
    """
    if request.recipe is not None:
        ground = own_ground(folder, request.recipe)
    elif request.model is not None:
        ground = real_ground(folder, request.model, request.data, request.smoke)
    else:
        ground = small_ground(folder, request.data, request.smoke)
    seeds = range(1, 1 + (1 if request.smoke else request.seeds))
    wanted = Wanted(request.methods or METHODS, request.ratios or ground.ratios, seeds, request.ruler)
    comparison = Comparison(ground, wanted)
    comparison.run()
    results = comparison.results()
    page.show(results, Console(width=150))
    comparison.make_page()
    root, whole = checkout(), Request(model="smollm2", seeds=request.seeds, ruler=request.ruler)
    if root is not None and request == whole:
        page.write(results, root)
    print(f"results: {os.path.relpath(comparison.folder / RESULTS)}")
