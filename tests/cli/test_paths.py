"""Paths on the command line that name nothing: refused before torch is imported, and nothing is read or written."""

from pathlib import Path

import pytest

from megatron_dmc.cli.command import main

TEXT = ["--input", "a.txt", "--tokenizer", "t"]


@pytest.mark.parametrize(
    ("arguments", "option"),
    [
        (["preprocess", "--input", "", "--tokenizer", "t", "--output", "o"], "--input"),
        (["preprocess", "--input", "a.txt", "--input", "", "--tokenizer", "t", "--output", "o"], "--input"),
        (["preprocess", "--input", "a.txt", "--tokenizer", "", "--output", "o"], "--tokenizer"),
        (["preprocess", *TEXT, "--output", ""], "--output"),
        (["preprocess", *TEXT, "--output", "o", "--chat", "--chat-template", ""], "--chat-template"),
        (["convert-from-hf", "", "o"], "HF_FOLDER|FILE.gguf"),
        (["convert-from-hf", "hf", ""], "OUTPUT_FOLDER"),
        (["convert-to-hf", "", "o"], "CHECKPOINT"),
        (["convert-to-hf", "c", ""], "OUTPUT_FOLDER"),
        (["convert-to-hf", "c", "o", "--base", ""], "--base"),
        (["inspect", ""], "checkpoint"),
        (["generate", "c", "--prompt", "a", "--base", ""], "--base"),
    ],
)
def test_an_empty_path_is_refused(
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
    arguments: list[str],
    option: str,
) -> None:
    monkeypatch.chdir(tmp_path)
    with pytest.raises(SystemExit, match="2"):
        main(arguments)
    last = capsys.readouterr().err.splitlines()[-1]
    assert f"argument {option}: an empty path; name a file or a folder (. is the working folder); see " in last
    assert not list(tmp_path.iterdir())


@pytest.mark.parametrize("output", ["data/", "data//", ".", "..", "data/.", "/"])
def test_a_dataset_needs_a_name(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str], output: str
) -> None:
    monkeypatch.chdir(tmp_path)
    with pytest.raises(SystemExit, match="2"):
        main(["preprocess", *TEXT, "--output", output])
    last = capsys.readouterr().err.splitlines()[-1]
    assert f"argument --output: {output} names a folder; add a name for the files in it, such as " in last
    assert not list(tmp_path.iterdir())
