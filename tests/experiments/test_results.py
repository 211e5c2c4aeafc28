"""The pages' numbers of the quickstart are those of one full run, examples/quickstart/results.json.

After a run that changes them, copy its summary.json there without "generation", and put what these tests say into the pages.
"""

import json
from typing import Any

from megatron_dmc.experiments.quickstart.table import COLUMNS, rows
from tests.support.processes import ROOT

RESULTS: dict[str, Any] = json.loads((ROOT / "examples" / "quickstart" / "results.json").read_text())
README = (ROOT / "README.md").read_text(encoding="utf-8")
PAGE = (ROOT / "docs" / "quickstart.md").read_text(encoding="utf-8")


def loss(checkpoint: str) -> float:
    found = (RESULTS["base"], RESULTS["control"], *RESULTS["dmc"])
    return next(row["loss_per_byte"] for row in found if row["checkpoint"] == checkpoint)


def cells(row: tuple[str, ...]) -> str:
    return "".join(f"| {cell} " if cell else "| " for cell in row) + "|"


def test_the_readme_shows_the_table_of_the_run() -> None:
    lines = [cells(COLUMNS), "|---" * len(COLUMNS) + "|"]
    for checkpoint, row in rows(RESULTS).items():
        lines.append(cells(tuple(f"**{cell}**" for cell in row) if checkpoint == "recipe/final" else row))
    assert "\n".join(lines) in README, "\n".join(lines)


def test_the_page_about_the_settings_has_the_same_run() -> None:
    for checkpoint, against in (("recipe/final", "control/final"), ("adapter/final", "base/final")):
        row = rows(RESULTS)[checkpoint]
        over = f"{loss(checkpoint) - loss(against):+.4f}"
        columns = f"| **4** | **{row[2]}** | **{row[5]}** | " + (
            f"**{over}** | |" if against == "control/final" else f"| **{over}** |"
        )
        assert columns in PAGE, columns
    assert f"control has {loss('control/final'):.4f} nats per byte" in PAGE
    assert f"base {loss('base/final'):.4f}" in PAGE.replace("\n", " ")


def test_what_the_readme_says_of_the_adapter() -> None:
    assert f"ends {loss('adapter/final') - loss('base/final'):.4f} nats per byte above" in README.replace("\n  ", " ")
