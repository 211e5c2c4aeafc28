"""Means over seeds, the Pareto front, and which figures a run has."""

import pytest

from megatron_dmc.report.figures import FRONT, Heat, Plot, Point, figures, front, points
from megatron_dmc.report.methods import LOOKS, look
from megatron_dmc.report.run import Curve, Measure, Row, Run, Served

LOSS, RECALL = Measure("loss", "nats"), Measure("recall", "share", more_is_better=True)
KIB = 1024


def row(method: str, target: float | None, loss: float, seed: int | None = None, **values: float) -> Row:
    name = f"{method}-{target}-{seed}"
    ratio = values.get("ratio", target or 1.0)
    return Row(
        name, method, method.upper(), ratio, target=target, seed=seed, cache_bytes=64 * KIB / ratio, values={LOSS: loss}
    )


def test_seeds_are_one_point_with_a_bar() -> None:
    rows = [
        row("dmc", 4.0, 2.5, 1, ratio=3.8),
        row("dmc", 4.0, 2.1, 2, ratio=4.2),
        row("dmc", 2.0, 2.0),
        row("dms", 4.0, 3.0),
    ]
    found = points(rows, lambda each: each.ratio, LOSS)
    assert [(point.method, point.x, point.y) for point in found] == [
        ("dmc", 2.0, 2.0),
        ("dmc", pytest.approx(4.0), pytest.approx(2.3)),
        ("dms", 4.0, 3.0),
    ]
    assert (found[1].lowest, found[1].highest) == (2.1, 2.5)
    assert found[1].note == "DMC for 4: 2.3, mean of 2"
    # What a row does not have is not drawn.
    assert points(rows, lambda each: each.ratio, RECALL) == []
    assert points(rows, lambda each: None, LOSS) == []


def at(x: float, y: float) -> Point:
    return Point("a", "A", x, y, y, y, "")


def test_the_front_is_what_nothing_beats() -> None:
    # More compression is better, less loss is.
    cloud = [at(1, 1.0), at(2, 1.1), at(2, 1.3), at(3, 1.05), at(4, 2.0), at(4, 2.0), at(3.5, 2.5)]
    assert [(point.x, point.y) for point in front(cloud, more_x=True, more_y=False)] == [
        (1, 1.0),
        (3, 1.05),
        (4, 2.0),
        (4, 2.0),
    ]
    # Fewer bytes are better, more recall is.
    cloud = [at(64, 1.0), at(32, 0.9), at(32, 1.0), at(16, 0.5), at(20, 0.4)]
    assert [(point.x, point.y) for point in front(cloud, more_x=False, more_y=True)] == [(16, 0.5), (32, 1.0)]


def test_a_run_has_the_figures_of_its_numbers(tmp_path) -> None:  # type: ignore[no-untyped-def]
    assert figures(Run(tmp_path, "nothing"), [], None) == []
    plain = Row("base", "base", "base", 1.0, cache_bytes=64 * KIB, values={LOSS: 1.0})
    run = Run(tmp_path, "a run", rows=[plain, row("dmc", 2.0, 2.0), row("dmc", 4.0, 3.0)], bytes_tokens=2000)
    (quality,) = figures(run, [], None)
    assert [choice.name for choice in quality.choices] == ["loss"]
    by_ratio, by_bytes = quality.choices[0].plots
    assert isinstance(by_ratio, Plot) and isinstance(by_bytes, Plot)
    assert [line.name for line in by_ratio.lines] == ["base", "DMC", FRONT]
    assert list(by_ratio.lines[1].x) == [2.0, 4.0] and list(by_bytes.lines[1].x) == [32.0, 16.0]
    assert list(by_bytes.lines[2].x) == [16.0, 32.0, 64.0]
    assert by_ratio.lines[1].below is None


def test_every_kind_of_figure(tmp_path) -> None:  # type: ignore[no-untyped-def]
    served = [Served(tokens, batch, 1e6 * tokens, 1.0, 10.0 * batch) for tokens in (100, 50) for batch in (1, 4)]
    rows = [
        Row(f"dmc-{seed}", "dmc", "DMC", 4.0, target=4.0, seed=seed, heads=[[1.0, 2.0]], served=served, commands=["c"])
        for seed in (1, 2)
    ]
    curve = Curve("training", {"target": ([1, 2], [1.0, 2.0]), "achieved": ([2], [1.5])})
    heads, training, serving = figures(Run(tmp_path, "a run", rows=rows, training=["t"]), [curve], None)
    assert [choice.name for choice in heads.choices] == ["DMC for 4: dmc-1", "DMC for 4: dmc-2"]
    assert heads.choices[0].plots == [Heat([[1.0, 2.0]])] and heads.commands == ["c"]
    assert [line.name for line in training.choices[0].plots[0].lines] == ["target", "achieved"]
    assert training.commands == ["t"]
    # Seeds are one line; each number of texts has a plot of its own.
    speed = serving.choices[0].plots
    assert [[(line.name, list(line.x), list(line.y)) for line in plot.lines] for plot in speed] == [
        [("DMC for 4", [50, 100], [10.0, 10.0])],
        [("DMC for 4", [50, 100], [40.0, 40.0])],
    ]


def test_a_method_has_one_look() -> None:
    assert look("dmc") == LOOKS["dmc"] != look("dms")
    assert look("never heard of") == look("never heard of") and look("\ud800").colour.startswith("#")
    # Colour and marker together tell the methods of a comparison apart.
    same = {"dmc": ("trained", "recipe"), "calibrated": ("adapter",), "dms": ("neuron",)}
    aliases = {alias for names in same.values() for alias in names}
    looks = [each for name, each in LOOKS.items() if name not in aliases]
    assert len(set(looks)) == len(looks)
