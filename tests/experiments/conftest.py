"""A model and text for the programs of ``quickstart --model`` and ``recipes --model``."""

import json
from collections.abc import Callable
from pathlib import Path

import pytest

from megatron_dmc.cli import main
from megatron_dmc.data.tokenizer import train_tokenizer
from tests.support.gguf_files import write_gguf
from tests.support.llamas import save_random_base
from tests.support.toy import TEXT


@pytest.fixture
def smoke(
    tiny_model: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capfd: pytest.CaptureFixture[str]
) -> Callable[[str], str]:
    """Runs a command on the tiny model at toy size, in the folder run of this test's own; returns what it says."""
    monkeypatch.chdir(tmp_path)

    def run(command: str) -> str:
        words = [command, "--smoke", "--model", str(tiny_model / "tiny"), "--data", str(tiny_model / "text.jsonl")]
        status = main([*words, "--output", "run"])
        said = capfd.readouterr()
        assert status == 0, said.err
        return said.out

    return run


@pytest.fixture(scope="session")
def tiny_model(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder with a tiny Llama of six layers and its tokenizer (tiny, tiny.gguf), and text (text.jsonl)."""
    folder = tmp_path_factory.mktemp("real")
    save_random_base(folder / "tiny", num_hidden_layers=6, max_position_embeddings=2048, hidden_size=64)
    train_tokenizer(TEXT, 300, folder / "tiny")
    write_gguf(folder / "tiny", folder / "tiny.gguf")
    with (folder / "text.jsonl").open("w") as file:
        for i, text in enumerate(TEXT * 4):
            file.write(json.dumps({"text": f"{i} {text} {i * i} {text[::-1]}"}) + "\n")
    return folder
