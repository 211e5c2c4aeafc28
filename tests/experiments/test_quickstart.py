"""The quickstart's text: the same text is not prepared again, another is not taken for it."""

import importlib.util
from pathlib import Path

import pytest

from tests.support.toy import TEXT

PATH = Path(__file__).parents[2] / "examples" / "small_run.py"


def test_another_text_under_the_same_name_is_noticed(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    specification = importlib.util.spec_from_file_location("small_run", PATH)
    assert specification is not None and specification.loader is not None
    run = importlib.util.module_from_spec(specification)
    specification.loader.exec_module(run)
    data = tmp_path / "data"
    data.mkdir()
    for i in range(200):
        (data / f"{i}.txt").write_text(f"{i} " + " ".join(f"{word}{i}" for word in TEXT[i % 60].split() * 8))
    quickstart = run.SmallRun(tmp_path / "run", str(data), smoke=True)
    quickstart.prepare_text()
    assert "datasets" in capsys.readouterr().out
    quickstart.prepare_text()
    assert not capsys.readouterr().out
    moved = data.rename(tmp_path / "moved")
    run.SmallRun(tmp_path / "run", str(moved), smoke=True).prepare_text()
    text = (moved / "7.txt").read_text()
    (moved / "7.txt").write_text(text[::-1])
    with pytest.raises(SystemExit, match="holds a run on other text"):
        run.SmallRun(tmp_path / "run", str(moved), smoke=True).prepare_text()
