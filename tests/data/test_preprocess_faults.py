"""A preprocessing that cannot go on: one line, and what stood under its names before is as it was."""

import os
import signal
import time
from pathlib import Path

import pytest

from megatron_dmc.cli import main
from tests.support.processes import ROOT, started
from tests.support.texts import full_disk

TOOL = ROOT / "tools" / "preprocess_data.py"


@pytest.fixture
def earlier(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> dict[str, bytes]:
    """A split and the tokenizer trained for it, in ``out``: the content of every file."""
    monkeypatch.chdir(tmp_path)
    Path("a.jsonl").write_text("".join(f'{{"text": "an earlier text, number {i}"}}\n' for i in range(40)))
    assert main(preprocessing("a.jsonl")) == 0
    return contents()


def preprocessing(text: str) -> list[str]:
    options = ["--train-tokenizer", "300", "--valid-fraction", "0.5", "--overwrite"]
    return ["preprocess", "--input", text, *options, "--output", "out/text"]


def contents() -> dict[str, bytes]:
    return {str(path): path.read_bytes() for path in sorted(Path("out").rglob("*")) if path.is_file()}


@pytest.mark.parametrize("size", [2_000, 40_000], ids=["tokenizer", "dataset"])
def test_a_full_disk(earlier: dict[str, bytes], size: int, capsys: pytest.CaptureFixture[str]) -> None:
    Path("b.jsonl").write_text("".join(f'{{"text": "{"other words " * 40}{i}"}}\n' for i in range(3000)))
    with full_disk(size):
        assert main(preprocessing("b.jsonl")) == 1
    said = capsys.readouterr().err
    assert said.startswith("megatron-dmc: cannot write the ") and said.endswith(": File too large\n")
    assert contents() == earlier
    assert sorted(os.listdir("out")) == sorted({Path(name).relative_to("out").parts[0] for name in earlier})


def test_a_line_that_is_bad_in_the_held_out_part(earlier: dict[str, bytes], capsys: pytest.CaptureFixture[str]) -> None:
    """It is met when the training part is whole."""
    lines = [f'{{"text": "another text, number {i}"}}\n' for i in range(400)]
    Path("b.jsonl").write_text("".join([*lines, "not json\n"]))
    assert main(preprocessing("b.jsonl")) == 1
    assert "b.jsonl:401 is not JSON" in capsys.readouterr().err
    assert contents() == earlier


@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGHUP])
@pytest.mark.parametrize("seen", [".tmp-", "text_valid.tmp-"], ids=["tokenizer", "held-out part"])
def test_an_interruption(earlier: dict[str, bytes], seen: str, number: signal.Signals) -> None:
    Path("b.jsonl").write_text("".join(f'{{"text": "{"other words " * 20}{i}"}}\n' for i in range(20_000)))
    with started(TOOL, *preprocessing("b.jsonl")[1:]) as process:
        while process.poll() is None and not any(seen in name for name in os.listdir("out")):
            time.sleep(0.001)
        process.send_signal(number)
        said, _ = process.communicate(timeout=60)
    assert process.returncode == 128 + number and "preprocess_data: interrupted" in said and "Traceback" not in said
    assert contents() == earlier
    assert sorted(os.listdir("out")) == sorted({Path(name).relative_to("out").parts[0] for name in earlier})


def test_what_a_killed_run_left_is_named_and_stays(earlier: dict[str, bytes], caplog: pytest.LogCaptureFixture) -> None:
    Path("b.jsonl").write_text("".join(f'{{"text": "{"other words " * 20}{i}"}}\n' for i in range(20_000)))
    with started(TOOL, *preprocessing("b.jsonl")[1:]) as process:
        while process.poll() is None and not any("text_train.tmp-" in name for name in os.listdir("out")):
            time.sleep(0.001)
        process.kill()
        process.wait()
    left = {name for name in os.listdir("out") if f".tmp-{process.pid}" in name}
    assert left
    assert main(preprocessing("a.jsonl")) == 0
    [line] = [record.getMessage() for record in caplog.records if "killed" in record.getMessage()]
    assert line.startswith(
        f"warning: {len(left)} file(s) or folder(s) were left by a run that was killed, the first is out/text_"
    )
    assert left < set(os.listdir("out"))


def test_preprocessing_into_a_checkpoint_is_refused(
    earlier: dict[str, bytes], capsys: pytest.CaptureFixture[str]
) -> None:
    Path("final").mkdir()
    Path("final", "dmc.json").touch()
    words = ["--input", "a.jsonl", "--tokenizer", "out/text_tokenizer", "--output", "final/data/text"]
    assert main(["preprocess", *words]) == 1
    assert (
        f"{Path('final').resolve()} is a checkpoint (it holds dmc.json), which nothing else" in capsys.readouterr().err
    )
    assert os.listdir("final") == ["dmc.json"]
