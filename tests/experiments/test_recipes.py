"""The comparison of recipes: every row is a valid run, and its table and figure show what was measured."""

from typing import Any

import pytest

from megatron_dmc.experiments.recipes import report, run
from megatron_dmc.recipe import load_recipe
from tests.support.processes import ROOT
from tests.support.toy import QUICKSTART_MODEL


@pytest.fixture(scope="module")
def results() -> dict[str, Any]:
    """Losses that rise with the ratio and fall with the window."""
    made: dict[str, Any] = {"base": {"loss_per_byte": 1.3}, "control": {"loss_per_byte": 1.2}}
    for row in run.rows():
        loss = 1.2 + 0.01 * row.ratio / (1 + row.local_window) + 0.001 * row.seed
        measured = {"loss_per_byte": loss, "compression_ratio": 1.01 * row.ratio, "cache_bytes": 2**20 // row.ratio}
        made[row.name] = {"row": vars(row), **measured}
    return made


def test_every_row_is_a_valid_run() -> None:
    rows = run.rows()
    assert len({row.name for row in rows}) == len(rows)
    for row in [*rows, *run.smoke_rows()]:
        path = ROOT / "examples" / "quickstart" / f"{row.recipe}.yaml"
        recipe = load_recipe(path, [f"model={QUICKSTART_MODEL}", *row.overrides])
        dmc = recipe.dmc
        assert (dmc.local_window, dmc.operation) == (row.local_window, row.operation)
        assert dmc.target_compression_ratio == row.ratio and recipe.merges
        # The published numbers were measured so.
        assert recipe.repeat_fraction == 0


def test_the_table_shows_what_was_measured(results: dict[str, Any]) -> None:
    lines = report.table(results).splitlines()
    merged = next(line for line in lines if "`projection`, merge, window | 16 | 8 |" in line)
    # The mean of three seeds: 1.2 + 0.08 / 17 + 0.001.
    assert "8.08 | 1.2057 (1.2047–1.2067, 3 seeds) | +0.0057 | -0.0943 | 128 KiB |" in merged
    assert len(lines) == 2 + 2 + 12
    cells = report.sweep(results).splitlines()
    assert len({line.count("|") for line in cells}) == 1
    assert cells[2].startswith("| 0 | +0.0200 | – |  | +0.0400 | – |")
    assert cells[-1].startswith("| 64 |") and cells[-1].endswith("| – | – |  |")


def test_the_figure_shows_every_row(results: dict[str, Any]) -> None:
    cost, windows = report.draw(results).axes
    assert len(cost.lines) == 6 + 2 and len(windows.lines) == 6
