"""The whole job on a small model and real text: pretrain, retrofit, compare, export, generate.

Every stage is a command that a user could type in the run's folder; a stage that is done is not done again.
"""

import argparse
import hashlib
import json
import os
import shutil
import subprocess
import sys
import time
import warnings
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path

HERE = Path(__file__).resolve().parent
REPOSITORY = HERE.parents[1]

VOCABULARY = 2048
HELDOUT_FRACTION = 0.02
# The cache is measured on as many held-out tokens.
CACHE_TOKENS = 2048

# {recipe: toy steps of its phases}
STAGES = {"base": (12,), "control": (12, 4), "recipe": (12, 4), "neuron": (4, 8, 4)}
TOY_SIZES = [
    "data.sequence_length=128",
    "model.hidden_size=48",
    "model.ffn_hidden_size=96",
    "model.num_layers=2",
    "training.micro_batch_size=4",
]


class Quickstart:
    """The stages of one run, in a folder of its own."""

    def __init__(self, folder: Path, data: str | None, smoke: bool) -> None:
        self.folder, self.data, self.smoke = folder, data, smoke
        self.seconds: dict[str, float] = {}

    def run(self) -> None:
        self._prepare_text()
        for name, toy_steps in STAGES.items():
            self._stage(f"training: {name}.yaml", f"checkpoints/{name}/final", self._training(name, toy_steps))
        for name, folder in (("recipe", "hf"), ("control", "hf-control")):
            convert = [
                sys.executable,
                str(REPOSITORY / "tools" / "megatron_to_hf.py"),
                f"checkpoints/{name}/final",
                folder,
            ]
            self._stage(f"export to Hugging Face: {folder}", folder, convert)
        evaluate = [sys.executable, str(HERE / "evaluate.py")]
        self._stage("evaluation", "summary.json", [*evaluate, "--smoke"] if self.smoke else evaluate)
        self._stage("figure", "figure.png", [sys.executable, str(HERE / "figure.py"), "summary.json", "figure.png"])
        self._call([*evaluate, "--show"])
        total = ", ".join(f"{name} {spent:.0f} s" for name, spent in self.seconds.items())
        print(f"{sum(self.seconds.values()):.0f} s: {total}" if total else "every stage was done before")

    def _prepare_text(self) -> None:
        """Splits the text, trains the tokenizer on the larger part, and writes both as megatron-core datasets."""
        wanted = {"text": self._digest(), "vocabulary": VOCABULARY, "smoke": self.smoke}
        done = self.folder / "data" / "done.json"
        if done.exists():
            if json.loads(done.read_text()) != wanted:
                sys.exit(f"quickstart: {self.folder} holds a run on other text; remove it, or name the same DATA")
            return
        self._timed("text, tokenizer, datasets", self._write_text)
        partial = done.with_suffix(".partial")
        partial.write_text(json.dumps(wanted))
        partial.replace(done)

    def _documents(self) -> Iterator[str]:
        from megatron_dmc.training.data import iter_documents, standard_library_documents

        return standard_library_documents() if self.data is None else iter_documents(self.data)

    def _digest(self) -> str:
        """Of all documents, in their order: the text is the same, wherever it lies."""
        digest = hashlib.sha256()
        for document in self._documents():
            digest.update(hashlib.sha256(document.encode()).digest())
        return digest.hexdigest()

    def _write_text(self) -> None:
        from megatron_dmc.config import ConfigError
        from megatron_dmc.training.data import build_indexed_dataset, split_documents
        from megatron_dmc.training.tokenizer import train_tokenizer

        folder = self.folder / "data"
        # What a stopped run left half-done.
        shutil.rmtree(folder, ignore_errors=True)
        folder.mkdir(parents=True)
        train, valid = split_documents(self._documents(), HELDOUT_FRACTION)
        tokenizer = train_tokenizer(train, VOCABULARY, folder / "tokenizer")
        for name, part in (("train", train), ("valid", valid)):
            counts = build_indexed_dataset(part, tokenizer, str(folder / name))
        if counts.tokens <= CACHE_TOKENS:
            raise ConfigError(
                f"the text gives {counts.tokens} held-out tokens, the quickstart needs more than {CACHE_TOKENS}; name about "
                f"{CACHE_TOKENS / max(counts.tokens, 1):.1f} times as much text"
            )

    def _training(self, name: str, toy_steps: Sequence[int]) -> list[str]:
        command = [sys.executable, "-m", "megatron_dmc", "retrofit", str(HERE / f"{name}.yaml")]
        if self.smoke:
            command += TOY_SIZES + [f"phases.{i}.steps={steps}" for i, steps in enumerate(toy_steps)]
            command += ["phases.0.lr_warmup_steps=0"]
            # So few steps change decisions only if they start near the edge.
            command += ["dmc.decision_bias=0.5"] if name in ("recipe", "neuron") else []
        return command

    def _stage(self, title: str, makes: str, command: list[str]) -> None:
        """Runs a command unless what it makes (whole or not at all) is there."""
        if not (self.folder / makes).exists():
            self._timed(title, lambda: self._call(command))

    def _timed(self, title: str, work: Callable[[], None]) -> None:
        print(f"== {title}", flush=True)
        began = time.perf_counter()
        work()
        self.seconds[title] = time.perf_counter() - began

    def _call(self, command: list[str]) -> None:
        """Runs one command in the run's folder; it explains its own errors."""
        environment = {**os.environ, "PYTHONWARNINGS": "ignore", "HF_HUB_OFFLINE": "1", "CUDA_VISIBLE_DEVICES": ""}
        if subprocess.run(command, cwd=self.folder, env=environment).returncode:
            sys.exit(1)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--data", help="a folder, .txt or .jsonl; by default the sources of Python's standard library")
    parser.add_argument("--smoke", action="store_true", help="everything at toy size")
    parsed = parser.parse_args()
    # megatron-core warns of every optional package that is not there, when it is imported.
    warnings.filterwarnings("ignore", module=r"megatron\.core")
    from megatron_dmc.config import ConfigError

    folder = REPOSITORY / "runs" / ("quickstart-smoke" if parsed.smoke else "quickstart")
    try:
        Quickstart(folder, parsed.data and str(Path(parsed.data).resolve()), parsed.smoke).run()
    except (ConfigError, OSError) as error:
        sys.exit(f"quickstart: {error}")
    except KeyboardInterrupt:
        sys.exit(130)


if __name__ == "__main__":
    main()
