"""What a report shows of a run, whichever kind of run it is. A reader of ``readers/`` makes it."""

import os
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path

# Methods that compress nothing.
PLAIN = ("base", "control")


@dataclass(frozen=True)
class Measure:
    """A quality that methods are compared by.

    Attributes:
        title: in the list that a reader of the page chooses from.
        axis: with its unit.
        more_is_better: as of recall; less is better of a loss.
    """

    title: str
    axis: str
    more_is_better: bool = False


@dataclass(frozen=True)
class Served:
    """Cache and speed of one text of so many tokens, or of ``batch`` such texts at once. Bytes; seconds; tokens per second."""

    tokens: int
    batch: int
    cache_bytes: float
    seconds_to_first_token: float
    tokens_per_second: float


@dataclass(frozen=True)
class Row:
    """One model that was measured.

    Attributes:
        name: its own.
        method: what it is an instance of; decides its colour. One of PLAIN: nothing is compressed.
        label: the method's name in figures.
        ratio: tokens per slot that it had; where nothing was measured, those that were asked for.
        target: tokens per slot that were asked for; None: of a plain model.
        cache_bytes: that its cache held.
        values: its qualities.
        heads: tokens per slot, [layers][kv_heads].
        commands: that made the numbers.
        step: of its training, for a checkpoint.
    """

    name: str
    method: str
    label: str
    ratio: float | None
    target: float | None = None
    seed: int | None = None
    cache_bytes: float | None = None
    values: dict[Measure, float] = field(default_factory=dict)
    heads: Sequence[Sequence[float]] | None = None
    served: Sequence[Served] = ()
    commands: Sequence[str] = ()
    trained_tokens: int | None = None
    training_seconds: float | None = None
    step: int | None = None


@dataclass(frozen=True)
class Stage:
    """A part of the run, the command that did it (empty: none), and its seconds."""

    title: str
    command: str
    seconds: float


@dataclass(frozen=True)
class Curve:
    """What one training logged: {name of a line: (steps, compression ratios)}."""

    name: str
    lines: Mapping[str, tuple[Sequence[int], Sequence[float]]]


@dataclass(frozen=True)
class Run:
    """All that a report shows but the curves and the decisions, which are read afterwards.

    Attributes:
        kind: in words, such as "a quickstart".
        facts: (what, value), of the model, the text and the machine.
        rows: plain models first.
        bytes_tokens: of the text that ``cache_bytes`` were measured on; None: none were.
        curves: folders with TensorBoard's files, by the name of the training.
        training: the commands of those trainings.
        models: folders that decisions can be read of, the first that can be loaded is taken.
        text: path prefixes of held-out datasets, the first that is there is taken.
    """

    folder: Path
    kind: str
    rows: Sequence[Row] = ()
    facts: Sequence[tuple[str, str]] = ()
    stages: Sequence[Stage] = ()
    bytes_tokens: int | None = None
    curves: dict[str, Path] = field(default_factory=dict)
    training: Sequence[str] = ()
    models: Sequence[Path] = ()
    text: Sequence[Path] = ()

    @property
    def name(self) -> str:
        """Of its folder, wherever it was named from."""
        return Path(os.path.abspath(self.folder)).name or "/"

    @property
    def measures(self) -> list[Measure]:
        """Of the models that compress, in their order."""
        return list(dict.fromkeys(measure for row in self.rows if row.method not in PLAIN for measure in row.values))
