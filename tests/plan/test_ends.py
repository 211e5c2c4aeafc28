"""The smallest and the largest numbers that a recipe takes can be planned, or are refused in one line."""

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from megatron_dmc.config import ranges
from tests.support import planning
from tests.support.settings import EVERYTHING, numbers

# Each alone makes a plan of minutes, or of a run that other settings do not fit.
LONG = ("model.num_layers", "data.sequence_length")
# Only what a plan computes with; reading a recipe has checked the others.
PLANNED = [row for row in numbers() if row[0].split(".")[0] in ("model", "dmc", "distillation") and row[0] not in LONG]


@pytest.mark.parametrize(("name", "section", "field"), PLANNED, ids=[name for name, _, _ in PLANNED])
def test_the_ends_can_be_planned(
    elsewhere: Callable[..., Any], tmp_path: Path, name: str, section: type, field: str
) -> None:
    path = tmp_path / "recipe.yaml"
    path.write_text(EVERYTHING)
    allowed = dict(ranges(section))[field]
    for end in (allowed.least, allowed.most):
        status, out, err = elsewhere(
            *(planning.command, "plan", path, "--nodes", "1", "--gpus-per-node", "1", f"{name}={end!r}")
        )
        if status == 2:
            assert out == "" and err.count("\n") == 1
        else:
            assert err == "" and "nan" not in out and "inf " not in out
            assert out.splitlines()[-1].startswith("fits: " if status == 0 else "does not fit: ")
