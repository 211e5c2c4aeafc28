"""Results in the form of kvpress' evaluation, whose folders its leaderboard shows (github.com/NVIDIA/kvpress, evaluation/)."""

import csv
import json
import os
import re
import shutil
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import NamedTuple

import yaml

from megatron_dmc.config import ConfigError
from megatron_dmc.evaluation.harness.ruler_data import Question
from megatron_dmc.files import why_nothing_new

# What kvpress' evaluation calls what is called otherwise here. Its expected_attention gives each head a number of its own.
_PRESS_NAMES = {
    "h2o": "observed_attention",
    "adakv_expected_attention": "expected_attention",
    "expected_attention": "expected_attention_without_adakv",
}
_CONTROL_CODES = re.compile(r"[\x00-\x1f]")


class Prediction(NamedTuple):
    """dropped: the share of its tokens that the cache did not keep, which kvpress calls compression_ratio."""

    question: Question
    text: str
    dropped: float


@dataclass(frozen=True)
class Submission:
    """One evaluation.

    Attributes:
        dataset: ruler is the official one.
        length: of its texts, in tokens.
        model: as the leaderboard should name it.
        press: the method; no_press of a plain model.
        fraction: of the data set that was read.
        dtype: of the weights.
    """

    dataset: str
    length: int
    model: str
    press: str
    fraction: float
    dtype: str
    predictions: Sequence[Prediction]

    @property
    def dropped(self) -> float:
        return sum(each.dropped for each in self.predictions) / len(self.predictions)

    @property
    def name(self) -> str:
        parts = [self.dataset, str(self.length), self.model.replace("/", "--"), self.press, f"{self.dropped:.2f}"]
        return "__".join([*parts, *([f"fraction{self.fraction:.3f}"] if self.fraction < 1 else [])])

    def write(self, folder: Path) -> Path:
        """A new folder in ``folder``: predictions.csv, metrics.json, config.yaml; whole or not at all. As kvpress does it, a
        second one of the same name becomes NAME/1."""
        place = folder / self.name
        if os.path.lexists(place):
            place = next(each for n in range(1, 10**6) if not os.path.lexists(each := place / str(n)))
        partial = place.with_name(f"{place.name}.tmp-{os.getpid()}")
        partial.mkdir(parents=True)
        try:
            self._write_predictions(partial / "predictions.csv")
            metrics = {task: {"string_match": score} for task, score in string_match(self.predictions).items()}
            (partial / "metrics.json").write_text(json.dumps(metrics, indent=4), encoding="utf-8")
            (partial / "config.yaml").write_text(yaml.safe_dump(self._config(), sort_keys=False), encoding="utf-8")
            partial.rename(place)
        finally:
            shutil.rmtree(partial, ignore_errors=True)
        return place

    def _write_predictions(self, path: Path) -> None:
        names = (
            "question",
            "answer_prefix",
            "answer",
            "task",
            "max_new_tokens",
            "predicted_answer",
            "compression_ratio",
        )
        with path.open("w", encoding="utf-8", newline="") as file:
            rows = csv.writer(file, lineterminator="\n")
            rows.writerow(names)
            for question, text, dropped in self.predictions:
                rows.writerow([*question[1:], text, dropped])

    def _config(self) -> dict[str, object]:
        """The settings of kvpress' evaluation that have a meaning here."""
        return {
            "dataset": self.dataset,
            "data_dir": str(self.length),
            "model": self.model,
            "press_name": self.press,
            "compression_ratio": round(self.dropped, 6),
            "key_channel_compression_ratio": None,
            "fraction": self.fraction,
            "max_new_tokens": None,
            "max_context_length": None,
            "query_aware": False,
            "model_kwargs": {"dtype": self.dtype},
            "press_init_command": f"megatron-dmc evaluate, {self.press}",
        }


def string_match(predictions: Sequence[Prediction]) -> dict[str, float]:
    """RULER's score of each task, 0 to 100: the share of the answers that a text contains, upper and lower case alike; in
    tasks named qa_... whether it contains one of them. Control codes in a text are left out before."""
    scores: dict[str, list[float]] = {}
    for question, text, _ in predictions:
        said = _CONTROL_CODES.sub("", text.strip()).strip().lower()
        found = [each.lower() in said for each in question.answer]
        is_any = question.task.split("_")[0] == "qa"
        scores.setdefault(question.task, []).append(float(any(found)) if is_any else sum(found) / len(found))
    return {task: round(100 * sum(each) / len(each), 2) for task, each in sorted(scores.items())}


def press_name(baseline: str | None, merges: bool) -> str:
    """Of a baseline by its name here, an export, or a plain model."""
    if baseline is None:
        return "dmc" if merges else "no_press"
    return _PRESS_NAMES.get(baseline, baseline)


def model_name(folder: str) -> str:
    """A relative path as it was typed, as in meta-llama/Llama-3.1-8B-Instruct; of any other one its last part."""
    path = Path(folder)
    return Path(os.path.abspath(path)).name if path.is_absolute() or ".." in path.parts else path.as_posix()


def check_leaderboard(folder: str) -> None:
    """Raises ConfigError where nothing can be written into this folder."""
    if os.path.lexists(folder) and not os.path.isdir(folder):
        raise ConfigError(f"--leaderboard {folder} is no folder; name a new one")
    if (problem := why_nothing_new(Path(folder) / "result")) is not None:
        raise ConfigError(f"--leaderboard {folder} cannot be written: {problem}; name another folder")
