"""A run's figures, as lines and tables of numbers that any library can draw."""

import shlex
import statistics
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from itertools import groupby
from typing import NamedTuple

from megatron_dmc.report.fates import Decisions
from megatron_dmc.report.methods import LOOKS, Look, look
from megatron_dmc.report.run import PLAIN, Curve, Measure, Row, Run, Served

FRONT = "Pareto front"
# As plotly calls them.
DASHES = ("solid", "dash", "dot", "dashdot")


@dataclass(frozen=True)
class Line:
    """Points, joined in their order.

    Attributes:
        dash: of DASHES.
        below, above: how far a bar reaches to either side of y; None: no bars.
        notes: what a point shows when it is pointed at.
    """

    name: str
    look: Look
    x: Sequence[float]
    y: Sequence[float]
    below: Sequence[float] | None = None
    above: Sequence[float] | None = None
    notes: Sequence[str] = ()
    dash: int = 0
    markers: bool = True


@dataclass(frozen=True)
class Plot:
    """Lines over one pair of axes."""

    x_title: str
    y_title: str
    lines: Sequence[Line]
    from_zero: bool = False


@dataclass(frozen=True)
class Heat:
    """Tokens per slot, [layers][kv_heads]."""

    values: Sequence[Sequence[float]]


class Choice(NamedTuple):
    """What is drawn when this name is chosen."""

    name: str
    plots: Sequence[Plot | Heat]


@dataclass(frozen=True)
class Figure:
    """Attributes:
    key: part of file names.
    chooser: what the choices are, such as "quality".
    caption: one sentence.
    commands: that made the numbers.
    """

    key: str
    title: str
    caption: str
    chooser: str
    choices: Sequence[Choice]
    commands: Sequence[str]


def figures(run: Run, curves: Sequence[Curve], decisions: Decisions | None) -> list[Figure]:
    """Those that the run has numbers for, but for the text itself."""
    made = [_quality(run), _heads(run, decisions), _training(run, curves), _serving(run)]
    return [figure for figure in made if figure.choices]


class Point(NamedTuple):
    """Of a method at one target: means over seeds of x and y, and the range of y."""

    method: str
    label: str
    x: float
    y: float
    lowest: float
    highest: float
    note: str


def points(rows: Sequence[Row], x: Callable[[Row], float | None], measure: Measure) -> list[Point]:
    """Means over seeds, in the order of the methods' first rows and then of their targets."""
    usable = [row for row in rows if measure in row.values and x(row) is not None]
    order = list(dict.fromkeys((row.method, row.label) for row in usable))

    def key(row: Row) -> tuple[int, float]:
        return order.index((row.method, row.label)), row.target or 0.0

    found = []
    for _, group in groupby(sorted(usable, key=key), key):
        same = list(group)
        values, places = [row.values[measure] for row in same], [value for row in same if (value := x(row)) is not None]
        name = _name(same[0])
        seeds = f", mean of {len(same)}" if len(same) > 1 else ""
        mean = statistics.fmean(values)
        note = f"{name}: {mean:.4g}{seeds}"
        ends = min(values), max(values)
        found.append(Point(same[0].method, same[0].label, statistics.fmean(places), mean, *ends, note))
    return found


def front(found: Sequence[Point], *, more_x: bool, more_y: bool) -> list[Point]:
    """The points that no other one is as good as in both and better than in one, by their x."""

    def beats(a: Point, b: Point) -> bool:
        x, y = (a.x - b.x) * (1 if more_x else -1), (a.y - b.y) * (1 if more_y else -1)
        return x >= 0 and y >= 0 and (x > 0 or y > 0)

    kept = [point for point in found if not any(beats(other, point) for other in found)]
    return sorted(kept, key=lambda point: point.x)


def _quality(run: Run) -> Figure:
    commands = [command for row in run.rows for command in row.commands]
    choices = []
    for measure in run.measures:
        against = (
            ("compression ratio", _ratio, True),
            ("KiB that the cache holds", _kib, False),
        )
        plots = [_against(run.rows, measure, *each) for each in against]
        choices.append(Choice(measure.title, [plot for plot in plots if plot.lines]))
    caption = (
        "Each point is a method at one compression ratio, the mean over its seeds with a bar from the lowest to the highest; "
        "the dashed line joins the points that no other one beats in quality and memory at once (the Pareto front)."
    )
    return Figure("quality", "What compression costs", caption, "quality", choices, _once(commands))


def _ratio(row: Row) -> float | None:
    return row.ratio


def _kib(row: Row) -> float | None:
    return None if row.cache_bytes is None else row.cache_bytes / 1024


def _against(rows: Sequence[Row], measure: Measure, title: str, x: Callable[[Row], float | None], more_x: bool) -> Plot:
    found = points(rows, x, measure)
    lines = []
    for (method, label), group in groupby(found, lambda point: (point.method, point.label)):
        same = list(group)
        has_bars = any(point.highest > point.lowest for point in same)
        lines.append(
            Line(
                label,
                look(method),
                [point.x for point in same],
                [point.y for point in same],
                below=[point.y - point.lowest for point in same] if has_bars else None,
                above=[point.highest - point.y for point in same] if has_bars else None,
                notes=[point.note for point in same],
            )
        )
    best = front(found, more_x=more_x, more_y=measure.more_is_better)
    if len(best) > 1:
        grey, ends = LOOKS["base"], ([point.x for point in best], [point.y for point in best])
        lines.append(Line(FRONT, grey, *ends, notes=[point.note for point in best], dash=1, markers=False))
    return Plot(title, measure.axis, lines)


def _heads(run: Run, decisions: Decisions | None) -> Figure:
    choices = [Choice(f"{_name(row)}: {row.name}", [Heat(row.heads)]) for row in run.rows if row.heads is not None]
    commands = [command for row in run.rows if row.heads is not None for command in row.commands]
    if not choices and decisions is not None:
        choices = [Choice(f"the first {len(decisions.tokens)} tokens of the text below", [Heat(decisions.heads)])]
        commands = [report_command(run)]
    caption = (
        "How many tokens share one slot of the cache, in every layer and KV head: 1 keeps every token, and a head with a "
        "large number keeps little."
    )
    return Figure("heads", "Where it compresses", caption, "model", choices, _once(commands))


def _training(run: Run, curves: Sequence[Curve]) -> Figure:
    looks = (LOOKS["base"], LOOKS["dmc"], LOOKS["dms"])
    choices = []
    for curve in curves:
        lines = [
            Line(
                name,
                looks[number % 3],
                steps,
                values,
                dash=int(name == "target"),
                markers=name != "target" and len(steps) < 40,
            )
            for number, (name, (steps, values)) in enumerate(curve.lines.items())
        ]
        choices.append(Choice(curve.name, [Plot("step", "compression ratio", lines)]))
    caption = (
        "The compression ratio that the training asked for at each step (target), and the one that the model had then."
    )
    return Figure("training", "Achieved against target ratio", caption, "training", choices, run.training)


_SERVED: tuple[tuple[str, str, Callable[[Served], float]], ...] = (
    ("tokens per second, decoding", "tokens/s", lambda served: served.tokens_per_second),
    ("seconds to the first token", "seconds", lambda served: served.seconds_to_first_token),
    ("MB that the cache holds", "MB", lambda served: served.cache_bytes / 1e6),
)


def _serving(run: Run) -> Figure:
    rows = [row for row in run.rows if row.served]
    choices = []
    for title, axis, value in _SERVED if any(row.method not in PLAIN for row in rows) else ():
        plots = []
        for batch in sorted({served.batch for row in rows for served in row.served}):
            together = "tokens of the text" if batch == 1 else f"tokens of each of {batch} texts at once"
            plots.append(Plot(together, axis, _served(rows, batch, value), from_zero=True))
        choices.append(Choice(title, plots))
    commands = [command for row in rows for command in row.commands]
    caption = (
        "How fast each model goes on from a text that it has read, and how much memory its cache takes then, by the text's "
        "length."
    )
    return Figure("serving", "Speed and memory", caption, "measured", choices, _once(commands))


def _served(rows: Sequence[Row], batch: int, value: Callable[[Served], float]) -> list[Line]:
    """One line for each method and target, means over seeds; those of one method differ in their dashes."""
    lines: list[Line] = []
    for name in dict.fromkeys(map(_name, rows)):
        same = [row for row in rows if _name(row) == name]
        found: dict[int, list[float]] = {}
        for served in (served for row in same for served in row.served if served.batch == batch):
            found.setdefault(served.tokens, []).append(value(served))
        lengths = sorted(found)
        values = [statistics.fmean(found[tokens]) for tokens in lengths]
        notes = [f"{name}: {each:.4g}" for each in values]
        method = look(same[0].method)
        dash = sum(line.look == method for line in lines) % len(DASHES)
        lines += [Line(name, method, lengths, values, notes=notes, dash=dash)] if lengths else []
    return lines


def _name(row: Row) -> str:
    """Of what a row is one seed of."""
    return f"{row.label} for {row.target:g}" if row.target else row.label


def report_command(run: Run) -> str:
    return shlex.join(["megatron-dmc", "report", run.name])


def _once(commands: Sequence[str]) -> list[str]:
    return list(dict.fromkeys(commands))
