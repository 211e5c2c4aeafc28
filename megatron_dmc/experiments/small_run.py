"""What the runs on a small model share: their text, and stages that are commands in the run's folder."""

import hashlib
import json
import os
import shlex
import shutil
import subprocess
import sys
import time
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import Any

from megatron_dmc.config import ConfigError
from megatron_dmc.convert.hf_config import read_json
from megatron_dmc.errors import DMCError, Terminated
from megatron_dmc.experiments.places import small_recipes
from megatron_dmc.files import LOCK, Claim, write_whole
from megatron_dmc.report.readers.quickstart import CACHE_TOKENS
from megatron_dmc.report.write import MISSING, PAGE, has_plotly

VOCABULARY = 2048
HELDOUT_FRACTION = 0.02
# Marks text that is being written: what lies beside it is a run's own.
UNFINISHED = "unfinished"

TOY_SIZES = [
    "data.sequence_length=128",
    "model.hidden_size=64",
    "model.ffn_hidden_size=96",
    "model.num_layers=2",
    "training.micro_batch_size=4",
    "phases.0.lr_warmup_steps=0",
    "monitor.eval_interval=8",
]
# {recipe: toy steps of its phases}
TOY_STEPS = {"base": (12,), "control": (12, 4), "recipe": (12, 4), "adapter": (12, 4), "neuron": (4, 8, 4)}


class CommandFailed(DMCError):
    """A command of a run did not finish."""


class SmallRun:
    """A folder, the text in it, and the commands that have run there.

    Args:
        folder: made if absent.
        data: a folder, .txt or .jsonl; None: the sources of Python's standard library.
        smoke: everything at toy size.

    Raises:
        ConfigError: the recipes are not there (see ``places``).
    """

    def __init__(self, folder: Path, data: str | None, smoke: bool) -> None:
        self.folder, self.data, self.smoke = folder.absolute(), data, smoke
        self.recipes = small_recipes()
        self.seconds: dict[str, float] = {}
        self._claim: Claim | None = None

    def prepare_text(self) -> None:
        """Splits the text, trains the tokenizer on the larger part, and writes both as megatron-core datasets.

        Raises:
            ConfigError: the folder holds other files or a run on other text, another process is at work in it, or the text
                is too short.
        """
        self._check_folder()
        # Kept for as long as this object is.
        self._claim = self._claim or Claim(self.folder)
        if self._claim.problem is not None:
            raise ConfigError(self._claim.problem)
        wanted = self._identity()
        done = self.folder / "data" / "done.json"
        if done.exists():
            self._check_same(read_object(done, remedy=f"remove {self.folder}"), wanted)
            return
        self.timed("text, tokenizer, datasets", self._write_text)
        write_whole(done, json.dumps(wanted))
        (self.folder / "data" / UNFINISHED).unlink()

    def _identity(self) -> dict[str, Any]:
        """What a run must have in common with one that is in the folder to go on with it."""
        return {"text": self._digest(), "vocabulary": VOCABULARY, "smoke": self.smoke}

    def _check_same(self, found: dict[str, Any], wanted: dict[str, Any]) -> None:
        if found != wanted:
            raise ConfigError(f"{self.folder} holds a run on other text; remove it, or name the same --data")

    def _check_folder(self) -> None:
        """Raises ConfigError for a folder with anything but such a run: its files could be taken for results, or removed; and
        for one inside the text's own folder: the run would read what it writes, without end."""
        # realpath, not resolve: that raises for a link which leads to itself.
        if self.data is not None and Path(os.path.realpath(self.folder)).is_relative_to(os.path.realpath(self.data)):
            raise ConfigError(
                f"--output {self.folder} lies inside --data {self.data}: it would read its own text; name a folder outside"
            )
        data = self.folder / "data"
        is_ours = (data / "done.json").exists() or (data / UNFINISHED).exists()
        if not is_ours and self.folder.is_dir() and any(path.name != LOCK for path in self.folder.iterdir()):
            raise ConfigError(
                f"--output {self.folder} holds other files than such a run's; name a new folder, or remove them"
            )

    def _documents(self) -> Iterator[str]:
        from megatron_dmc.data import iter_documents, standard_library_documents

        return standard_library_documents() if self.data is None else iter_documents(self.data, "--data")

    def _digest(self) -> str:
        """A digest of all documents in their order: the same text has the same, wherever it lies."""
        digest = hashlib.sha256()
        for document in self._documents():
            digest.update(hashlib.sha256(document.encode()).digest())
        return digest.hexdigest()

    def _new_text_folder(self) -> Path:
        """The folder of the run's text, empty but for what marks it as unfinished."""
        folder = self.folder / "data"
        if (folder / UNFINISHED).exists():
            # What a stopped run left half-done.
            shutil.rmtree(folder)
        folder.mkdir(parents=True)
        (folder / UNFINISHED).touch()
        return folder

    def _write_text(self) -> None:
        from megatron_dmc.data import build_indexed_dataset, split_documents
        from megatron_dmc.data.tokenizer import train_tokenizer

        folder = self._new_text_folder()
        train, valid = split_documents(self._documents(), HELDOUT_FRACTION)
        tokenizer = train_tokenizer(train, VOCABULARY, folder / "tokenizer")
        for name, part in (("train", train), ("valid", valid)):
            counts = build_indexed_dataset(part, tokenizer, str(folder / name))
        if counts.tokens <= CACHE_TOKENS:
            raise ConfigError(
                f"the text gives {counts.tokens} held-out tokens, this needs more than {CACHE_TOKENS}; name about "
                f"{CACHE_TOKENS / max(counts.tokens, 1):.1f} times as much text"
            )

    def training(self, recipe: str, overrides: Sequence[str] = ()) -> list[str]:
        """The words of the command that runs one of examples/quickstart's recipes, at toy size for a smoke run."""
        words = ["retrofit", str(self.recipes / f"{recipe}.yaml")]
        if self.smoke:
            words += TOY_SIZES + [f"phases.{i}.steps={steps}" for i, steps in enumerate(TOY_STEPS[recipe])]
            # So few steps change decisions only if they start near the edge.
            words += ["dmc.decision_bias=0.5"] if recipe not in ("base", "control") else []
        return words + list(overrides)

    def process(self, words: Sequence[str]) -> list[str]:
        """``megatron-dmc`` with these words, whether it is on the PATH or not."""
        return [sys.executable, "-m", "megatron_dmc", *words]

    def stage(self, title: str, makes: str, words: Sequence[str]) -> None:
        """Runs ``megatron-dmc`` with these words in the run's folder unless what it makes (whole or not at all) is there.

        Raises:
            CommandFailed: after the command has printed why.
        """
        if not (self.folder / makes).exists():
            self.timed(title, lambda: self._call(title, words))

    def make_page(self) -> None:
        """The stage that makes the run's page, which is for people: a run without plotly goes without it."""
        if not has_plotly():
            print(f"report: left out, {MISSING}, and megatron-dmc report {shlex.quote(os.path.relpath(self.folder))}")
            return
        self.stage("report", PAGE, ["report", "."])
        print(f"report: {os.path.relpath(self.folder / PAGE)}")

    def timed(self, title: str, work: Callable[[], None]) -> None:
        print(f"== {title}", flush=True)
        began = time.perf_counter()
        work()
        self.seconds[title] = time.perf_counter() - began

    def _call(self, title: str, words: Sequence[str]) -> None:
        """Shows one command and runs it in the run's folder; it explains its own errors."""
        print(f"{os.path.relpath(self.folder)}$ {shlex.join(['megatron-dmc', *words])}", flush=True)
        interrupted: KeyboardInterrupt | None = None
        with subprocess.Popen(self.process(words), cwd=self.folder, env=self.environment) as process:
            while process.returncode is None:
                try:
                    process.wait()
                except KeyboardInterrupt as interrupt:
                    # Ctrl-C reaches the command as well: a training saves, and ends by itself.
                    interrupted = interrupt
                    if isinstance(interrupt, Terminated):
                        process.terminate()
        if interrupted is not None:
            raise interrupted
        if process.returncode:
            raise CommandFailed(f"{title} did not finish; see above")

    @property
    def environment(self) -> dict[str, str]:
        """The environment of every command: the small model is for the CPU, also where there is a GPU."""
        return {**os.environ, "PYTHONWARNINGS": "ignore", "HF_HUB_OFFLINE": "1", "CUDA_VISIBLE_DEVICES": ""}


def read_object(path: Path, *needs: str, remedy: str = "remove it") -> dict[str, Any]:
    """What a run has written. Raises ConfigError for a file that is gone or damaged, or lacks one of the names."""
    try:
        found = read_json(path)
    except ConfigError:
        found = None
    if found is None or not found.keys() >= set(needs):
        raise ConfigError(f"{path} is gone or damaged; {remedy}, and run again")
    return found
