"""The comparison of recipes: every row is a valid run, and its table and figure show what was measured."""

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from megatron_dmc.cli import main
from megatron_dmc.experiments.places import real_model_recipes
from megatron_dmc.experiments.real_model.retrofits import Budget
from megatron_dmc.experiments.recipes import real_model, real_report, report, run
from megatron_dmc.recipe import load_recipe
from tests.support.llamas import SMOLLM2
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


def test_every_form_is_a_valid_run() -> None:
    forms, recipes = real_model.forms(), real_model_recipes()
    assert len({form.name for form in forms}) == len(forms) == 10 * len(real_model.SEEDS)
    for form in forms:
        start, trained = (
            load_recipe(words[1], [*words[2:], *SMOLLM2])
            for words in (Budget(real_model.TOKENS, smoke=False).words(each, recipes) for each in form.retrofits)
        )
        assert [phase.kind for phase in (*start.phases, *trained.phases)] == ["calibrate", "solidify"]
        assert trained.checkpoint.load_base == f"{start.checkpoint.directory}/final"
        assert trained.total_steps * trained.training.global_batch_size * 2048 == real_model.TOKENS
        for recipe in (start, trained):
            dmc = recipe.dmc
            assert (dmc.operation, dmc.local_window) == (form.operation, form.local_window)
            assert (dmc.target_compression_ratio, recipe.data.seed) == (form.ratio, form.seed)


def test_forms_from_a_folder_to_a_table(smoke: Callable[[str], str], tmp_path: Path) -> None:
    said = smoke("recipes")
    results = json.loads((tmp_path / "run" / "results.json").read_text())
    (row,) = results["rows"]
    assert row["dmc"]["operation"] == row["operation"] == "evict" and row["kl"] > 0
    assert [each["tokens"] for each in row["copying"]] == [128] and row["compression_ratio"] > 1
    assert "| evict | 8 | 4 |" in said
    # Its export was only for the evaluation; nothing is done again.
    assert sorted(path.name for path in (tmp_path / "run").glob("hf-*")) == ["hf-base"]
    assert "$ megatron-dmc" not in smoke("recipes")


def test_the_table_of_forms_shows_what_was_measured() -> None:
    def row(operation: str, seed: int, kl: float, recall: float | None) -> dict[str, Any]:
        copying = [{"tokens": 512, "loss": 0.4}, {"tokens": 2048, "loss": 10 * kl}]
        return {
            **{"ratio": 8, "operation": operation, "local_window": 32, "seed": seed, "compression_ratio": 8.5},
            **{"loss": 2.5 + kl, "kl": kl, "copying": copying, "recall_over_base": recall},
        }

    base = {"loss": 2.5, "copying": [{"tokens": 512, "loss": 0.3}, {"tokens": 2048, "loss": 0.2}]}
    rows = [row("evict", 1, 0.2, None), row("absorb", 1, 0.1, 0.9), row("absorb", 2, 0.04, 0.8)]
    lines = real_report.table({"base": base, "tokens": 1, "rows": rows}).splitlines()
    assert len({line.count("|") for line in lines}) == 1
    assert lines[2:] == [
        "| base |  |  | 1 |  |  | 0.300 | 0.200 |  |  |",
        "| absorb | 32 | 8 | 8.50 | +0.070 (+0.040 to +0.100) | 0.070 (0.040 to 0.100) | 0.400 (0.400 to 0.400) | "
        "0.700 (0.400 to 1.000) | 85% (80% to 90%) | 2 |",
        "| evict | 32 | 8 | 8.50 | +0.200 | 0.200 | 0.400 | 2.000 |  | 1 |",
    ]


def test_data_goes_with_a_model(capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["recipes", "--smoke", "--data", "somewhere"]) == 1
    assert "--data goes with --model; add --model smollm2" in capsys.readouterr().err


def test_the_table_of_forms_is_that_of_the_committed_run() -> None:
    results = ROOT / "examples" / "recipes" / "smollm2.json"
    page = (ROOT / "docs" / "choosing.md").read_text(encoding="utf-8")
    assert results.exists() == (real_report.BEGIN in page)
    if results.exists():
        assert real_report.table(json.loads(results.read_text(encoding="utf-8"))) in page
