"""Runs that are a list of stages: each makes one file or folder, and is not done again once that is there."""

import json
import shutil
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from megatron_dmc.convert.identity import model_digest
from megatron_dmc.experiments.small_run import SmallRun, read_object
from megatron_dmc.files import write_whole


@dataclass(frozen=True)
class Stage:
    """One part of the run.

    Attributes:
        title: what it is called.
        makes: below the run's folder; it is there as a whole once the stage is done.
        work: the words of a command, or what is done in this process.
        expected: seconds on two cores.
        export: what is made from it: that of its earlier form is removed.
        report: of what is made, or of its export: that of an earlier form is set aside, and taken back if the export is the
            same.
        serves: what it is made for: where all of that is there, it is not needed.
        is_done: in place of looking for what it makes.
    """

    title: str
    makes: str
    work: Sequence[str] | Callable[[], None]
    expected: float
    export: str | None = None
    report: str | None = None
    serves: tuple[str, ...] = ()
    is_done: Callable[[], bool] | None = None


class StagedRun(SmallRun):
    """A folder, and the stages that have run there; ``stages.json`` tells what each took."""

    def _is_done(self, stage: Stage) -> bool:
        if stage.serves and all((self.folder / path).exists() for path in stage.serves):
            return True
        return (self.folder / stage.makes).exists() if stage.is_done is None else stage.is_done()

    def _do(self, stage: Stage, clock: "Clock") -> None:
        if self._is_done(stage):
            return
        if stage.export is not None:
            remove(self.folder / stage.export)
        if stage.report is not None:
            _set_aside(self.folder / stage.report)
        print(clock.line(), flush=True)
        command = "" if callable(stage.work) else " ".join(["megatron-dmc", *stage.work])
        # It is published: as somebody would write it in a checkout, not where the recipes lie on this machine.
        command = command.replace(f"{self.recipes.parent}/", "examples/")
        if callable(stage.work):
            self.timed(stage.title, stage.work)
        else:
            words = stage.work
            self.timed(stage.title, lambda: self._call(stage.title, words))
        if stage.report is not None and stage.export is None:
            _take_back(self.folder / stage.report, model_digest(self.folder / stage.makes))
        clock.done(stage)
        path = self.folder / "stages.json"
        before = read_stages(path)
        row = {"stage": stage.title, "command": command, "seconds": round(self.seconds[stage.title], 1)}
        write_whole(path, json.dumps([*(each for each in before if each["stage"] != stage.title), row], indent=1))


class Clock:
    """How much of a run is left, by what its stages are expected to take and by how long those before took."""

    def __init__(self, stages: Sequence[Stage]) -> None:
        self._began, self._count, self._number = time.monotonic(), len(stages), 1
        self._expected, self._done = sum(stage.expected for stage in stages), 0.0

    def line(self) -> str:
        spent = time.monotonic() - self._began
        # Before anything is done only the expectation is known; a short stage says little of the others' speed.
        trust = self._done / (self._done + 60)
        speed = 1 - trust + trust * spent / self._done if self._done else 1.0
        left = (self._expected - self._done) * speed
        return f"-- {self._number} of {self._count}, {_minutes(spent)} so far, about {_minutes(left)} left"

    def done(self, stage: Stage) -> None:
        self._done += stage.expected
        self._number += 1


def remove(folder: Path) -> None:
    """A folder or a link to one, if it is there; first from its name, so that no half of it is taken for the whole."""
    gone = folder.with_name(f".{folder.name}.removed")
    if gone.exists():
        shutil.rmtree(gone)
    if folder.is_symlink():
        folder.unlink()
    elif folder.exists():
        shutil.rmtree(folder.rename(gone))


def _set_aside(report: Path) -> None:
    if report.exists():
        report.replace(report.with_suffix(".before"))


def _take_back(report: Path, digest: str) -> None:
    """A report that was set aside, if it is of a model with this digest."""
    before = report.with_suffix(".before")
    if before.exists() and read_object(before, "weights")["weights"] == digest:
        before.replace(report)


def _minutes(seconds: float) -> str:
    return f"{seconds:.0f} s" if seconds < 90 else f"{seconds / 60:.0f} min"


def read_stages(path: Path) -> list[dict[str, Any]]:
    """What a run did so far: stage, command and seconds. Nothing where the file is damaged: it only tells."""
    try:
        found = json.loads(path.read_text(encoding="utf-8"))
        return [{name: row[name] for name in ("stage", "command", "seconds")} for row in found]
    except (OSError, ValueError, TypeError, KeyError):
        return []
