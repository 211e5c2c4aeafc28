"""A run replaces its own checkpoints and nothing else, and can write where it is to write."""

import sys
from pathlib import Path

import pytest
import torch.distributed as dist

from megatron_dmc.config import ConfigError
from megatron_dmc.recipe import load_recipe
from megatron_dmc.training.run_state import check_outputs
from tests.support.processes import run_ranks
from tests.support.settings import EVERYTHING


def check(folder: Path, directory: str, *overrides: str) -> None:
    (folder / "recipe.yaml").write_text(EVERYTHING)
    recipe = load_recipe(folder / "recipe.yaml", [f"checkpoint.directory={directory}", *overrides])
    check_outputs(recipe)


@pytest.mark.parametrize("name", ["final", "cr_2", "step_00000002"])
@pytest.mark.parametrize("content", ["folder", "file", "link"])
def test_what_is_no_checkpoint_is_not_replaced(tmp_path: Path, name: str, content: str) -> None:
    path = tmp_path / "run" / name
    path.parent.mkdir()
    if content == "file":
        path.write_text("thesis")
    else:
        folder = path if content == "folder" else tmp_path / "precious"
        folder.mkdir()
        (folder / "thesis.txt").write_text("years of work")
        if content == "link":
            path.symlink_to(folder)
    with pytest.raises(ConfigError, match=f"{path} is no checkpoint, and this run would replace it"):
        check(tmp_path, str(path.parent))


def test_other_names_empty_folders_and_own_checkpoints_are_let_be(tmp_path: Path) -> None:
    for place in ("notes", "final-draft", "cr_x", "step_00000004"):
        (tmp_path / "run" / place).mkdir(parents=True)
        (tmp_path / "run" / place / ("dmc.json" if place.startswith("step") else "thesis.txt")).touch()
    (tmp_path / "run" / "final").mkdir()
    check(tmp_path, str(tmp_path / "run"))
    check(tmp_path, str(tmp_path / "new"))


@pytest.mark.parametrize("setting", ["checkpoint.load_base", "distillation.teacher"])
def test_a_base_is_not_replaced(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, setting: str) -> None:
    monkeypatch.chdir(tmp_path)
    Path("link").symlink_to("run")
    for base, directory in (
        ("run/final", "run"),
        ("run/step_00000004", "./run/"),
        ("link/final", "run"),
        ("run", "run"),
    ):
        with pytest.raises(ConfigError, match=f"{setting} {base} lies in checkpoint.directory .*; name another"):
            check(tmp_path, directory, f"{setting}={base}")
    for base, directory in (("run/base", "run"), ("run/final", "run/more"), ("elsewhere/final", "run")):
        check(tmp_path, directory, f"{setting}={base}")


@pytest.mark.parametrize("setting", ["checkpoint.directory", "data.cache", "monitor.tensorboard"])
@pytest.mark.parametrize("place", ["", "deep/er"])
def test_nothing_is_written_into_a_checkpoint(tmp_path: Path, setting: str, place: str) -> None:
    checkpoint = tmp_path / "other" / "final"
    checkpoint.mkdir(parents=True)
    (checkpoint / "dmc.json").touch()
    with pytest.raises(ConfigError, match=f"{setting} {checkpoint / place}.*: {checkpoint} is a checkpoint .*, which"):
        check(tmp_path, str(tmp_path / "run"), f"{setting}={checkpoint / place}")


@pytest.mark.parametrize("setting", ["data.cache", "monitor.tensorboard"])
def test_a_checkpoint_does_not_replace_what_else_is_written(tmp_path: Path, setting: str) -> None:
    run = tmp_path / "run"
    for name in ("final", "cr_2", "step_00000004", "latest", ".latest.tmp", ".final.old", ".cr_2.tmp-0123abcd/deeper"):
        with pytest.raises(ConfigError, match=f"{setting} {run / name} has a name that this run gives its own"):
            check(tmp_path, str(run), f"{setting}={run / name}")
    for other in (run, run / "curves", run / ".cache" / "final", tmp_path / "final"):
        check(tmp_path, str(run), f"{setting}={other}")


@pytest.mark.parametrize("setting", ["checkpoint.directory", "monitor.tensorboard"])
def test_what_cannot_be_written_is_refused(tmp_path: Path, setting: str) -> None:
    (tmp_path / "file").touch()
    (tmp_path / "loop").symlink_to("loop")
    for place, problem in (
        ("file", "file is a file, not a folder"),
        ("file/below", "file is a file, not a folder"),
        ("loop/x", "loop is a link to loop, which does not exist"),
    ):
        folder = tmp_path / place
        with pytest.raises(ConfigError, match=f"{setting} {folder} cannot be written: .*{problem}.*; name another"):
            check(tmp_path, str(tmp_path / "run"), f"{setting}={folder}")


def test_only_the_first_rank_writes_curves(tmp_path: Path) -> None:
    """Another node need not have that folder."""
    (tmp_path / "file").touch()
    first, second = run_ranks(2, "-m", __name__, str(tmp_path))
    assert "monitor.tensorboard" in first.stderr and "is a file, not a folder; name another" in first.stderr
    assert second.returncode == 0, second.stderr


if __name__ == "__main__":
    dist.init_process_group("gloo")
    at = Path(sys.argv[1])
    own = at / str(dist.get_rank())
    own.mkdir()
    check(own, str(at / "run"), f"monitor.tensorboard={at / 'file'}")
