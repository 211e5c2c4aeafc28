"""The quickstart's text: the same text is not prepared again, and another text is noticed."""

import os
import signal
from pathlib import Path

import pytest

from megatron_dmc.config import ConfigError
from megatron_dmc.experiments.small_run import TOY_SIZES, TOY_STEPS, SmallRun
from megatron_dmc.files import LOCK
from megatron_dmc.recipe import load_recipe
from tests.support import processes
from tests.support.processes import ROOT, at_work_in, started
from tests.support.toy import TEXT


def test_another_text_under_the_same_name_is_noticed(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    data = tmp_path / "data"
    data.mkdir()
    for i in range(200):
        (data / f"{i}.txt").write_text(f"{i} " + " ".join(f"{word}{i}" for word in TEXT[i % 60].split() * 8))
    quickstart = SmallRun(tmp_path / "run", str(data), smoke=True)
    quickstart.prepare_text()
    assert "datasets" in capsys.readouterr().out
    quickstart.prepare_text()
    assert not capsys.readouterr().out
    # It still has the folder.
    claim = "import sys, pathlib, megatron_dmc.files as files; print(files.Claim(pathlib.Path(sys.argv[1])).problem)"
    assert f"is in use by process {os.getpid()} on" in processes.run("-c", claim, tmp_path / "run").stdout
    moved = data.rename(tmp_path / "moved")
    SmallRun(tmp_path / "run", str(moved), smoke=True).prepare_text()
    text = (moved / "7.txt").read_text()
    (moved / "7.txt").write_text(text[::-1])
    with pytest.raises(ConfigError, match="holds a run on other text"):
        SmallRun(tmp_path / "run", str(moved), smoke=True).prepare_text()


def test_other_peoples_files_stay(tmp_path: Path) -> None:
    """``data`` is a common name: a folder that is no run of this kind is not touched."""
    kept = tmp_path / "project" / "data" / "thesis.tex"
    kept.parent.mkdir(parents=True)
    kept.write_text("years of work")
    for folder in (kept.parent, kept.parents[1]):
        with pytest.raises(
            ConfigError, match=f"--output {folder} holds other files than such a run's; name a new folder"
        ):
            SmallRun(folder, None, smoke=True).prepare_text()
    assert [path.name for path in kept.parents[1].rglob("*")] == ["data", "thesis.tex"]
    assert kept.read_text() == "years of work"


def test_two_runs_in_one_folder_are_refused(tmp_path: Path) -> None:
    with at_work_in(tmp_path / "run"), pytest.raises(ConfigError, match="run is in use by process"):
        SmallRun(tmp_path / "run", None, True).prepare_text()
    # What a run left that was killed at once is no other people's file.
    assert [path.name for path in (tmp_path / "run").iterdir()] == [LOCK]
    SmallRun(tmp_path / "run", None, True)._check_folder()


def test_a_run_that_was_stopped_begins_anew(tmp_path: Path) -> None:
    data = tmp_path / "text"
    data.mkdir()
    (data / "a.txt").write_text("The cat sat on the mat. " * 20)
    run = SmallRun(tmp_path / "run", str(data), smoke=True)
    # Too short: the text is written, and then refused.
    for _ in range(2):
        with pytest.raises(ConfigError, match=r"name about .* times as much text"):
            run.prepare_text()


def test_the_toy_sizes_make_a_valid_run() -> None:
    base = load_recipe(
        ROOT / "examples" / "quickstart" / "base.yaml", [*TOY_SIZES, f"phases.0.steps={TOY_STEPS['base'][0]}"]
    )
    assert base.model.hidden_size == 64


def test_a_stage_shows_its_command(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    tmp_path.joinpath("a run").mkdir()
    SmallRun(tmp_path / "a run", None, smoke=True).stage("versions", "nothing", ["--version"])
    assert capsys.readouterr().out == f"== versions\n{os.path.relpath(tmp_path / 'a run')}$ megatron-dmc --version\n"


def test_a_signal_to_the_run_alone_ends_its_command(tmp_path: Path) -> None:
    """SIGTERM reaches one process. The command cleans up, and the run ends after it."""
    child = f"""
import pathlib, signal, time
signal.signal(signal.SIGTERM, lambda *_: (pathlib.Path({str(tmp_path / "clean")!r}).touch(), exit(75)))
print("begun", flush=True)
time.sleep(100)
"""
    program = f"""
import pathlib, sys
from types import SimpleNamespace
from megatron_dmc.cli import run_alone
from megatron_dmc.experiments.small_run import SmallRun

class Run(SmallRun):
    def process(self, words):
        return words

def run(options):
    Run(pathlib.Path({str(tmp_path)!r}), None, True).stage("work", "absent", [sys.executable, "-c", {child!r}])

sys.exit(run_alone(SimpleNamespace(HELP="", add_arguments=lambda parser: None, run=run), "tool", []))
"""
    with started("-c", program) as process:
        assert process.stdout is not None
        assert next(line for line in process.stdout if line == "begun\n")
        process.send_signal(signal.SIGTERM)
        said, _ = process.communicate(timeout=60)
    assert (process.returncode, said) == (128 + signal.SIGTERM, "tool: interrupted\n")
    assert (tmp_path / "clean").exists()
