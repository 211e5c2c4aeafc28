"""Nodes that do not see the same files: all ranks resume from what rank 0 sees, or all end with the same line."""

import re
import shutil
from pathlib import Path

import pytest

from megatron_dmc.cli import main
from tests.support.processes import PRODUCT, run_ranks
from tests.support.toy import recipe_values, write_recipe, write_text

pytestmark = [pytest.mark.distributed, pytest.mark.usefixtures("one_process")]


@pytest.mark.parametrize(
    ("second_node", "message"),
    [
        ("sees nothing", r"rank 1 on \S+ does not see checkpoints/step_00000002, which rank 0 resumes from"),
        # It resumes from rank 0's, and gets as far as the next save.
        ("sees an older latest", r"cannot save checkpoints/final: rank 1 on \S+ does not see"),
    ],
    ids=["nothing", "older"],
)
def test_resume_with_another_view(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, second_node: str, message: str
) -> None:
    write_text(tmp_path)
    values = recipe_values(tmp_path, tmp_path, [{"kind": "compress", "steps": 3, "lr": 1e-3}])
    values["checkpoint"] |= {"directory": "checkpoints", "save_interval": 1, "save_every_integer_ratio": False}
    values["monitor"]["tensorboard"] = None
    recipe = str(write_recipe(tmp_path, values))
    nodes = [tmp_path / "first", tmp_path / "second"]
    for node in nodes:
        node.mkdir()
    monkeypatch.chdir(nodes[0])
    assert main(["retrofit", recipe, "training.exit_after_steps=2"]) == 0
    if second_node == "sees an older latest":
        shutil.copytree("checkpoints", nodes[1] / "checkpoints")
        (nodes[1] / "checkpoints" / "latest").write_text("step_00000001\n")

    tasks = run_ranks(2, *PRODUCT, "retrofit", recipe, folders=nodes, timeout=120)
    errors = [task.stderr for task in tasks]
    lines = [[line for line in error.splitlines() if line.startswith("megatron-dmc:")] for error in errors]
    assert [task.returncode for task in tasks] == [1, 1], errors
    assert lines[0] == lines[1] and len(lines[0]) == 1
    assert re.search(message, lines[0][0])
