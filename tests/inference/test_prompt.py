"""The prompt of ``megatron-dmc generate``: tokenized as the exported tokenizer does it in transformers."""

import shutil
from pathlib import Path

import pytest
import torch
import yaml
from transformers import AutoTokenizer

from megatron_dmc.cli import main
from megatron_dmc.data import build_indexed_dataset
from megatron_dmc.inference.generate import generate, new_text
from megatron_dmc.inference.loading import load_model
from tests.support.tokenizer_folders import tokenizer_folder

pytestmark = pytest.mark.usefixtures("one_process")

BEGIN, TURN, END = "<|begin|>", "<|turn|>", "<|end|>"


@pytest.fixture(scope="module")
def checkpoint(one_process: None, tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("run")
    tokenizer = tokenizer_folder(folder / "tokenizer", BEGIN, TURN, END, frame=f"{BEGIN} $A", bos_token=BEGIN)
    build_indexed_dataset(["one small text about the weather"] * 40, tokenizer, folder / "text")
    recipe = {
        "model": {
            **{"num_layers": 2, "hidden_size": 32, "ffn_hidden_size": 48, "num_attention_heads": 4},
            **{"num_query_groups": 2, "vocab_size": tokenizer.vocab_size, "max_position_embeddings": 64},
            "init_method_std": 0.5,  # so that the prompt decides what follows
        },
        "data": {
            **{"train": [str(folder / "text")], "tokenizer": str(folder / "tokenizer")},
            **{"sequence_length": 32, "cache": str(folder / "cache")},
        },
        "phases": [{"kind": "compress", "steps": 1}],
        "training": {"micro_batch_size": 1, "global_batch_size": 1, "bf16": False},
        "checkpoint": {"directory": str(folder / "checkpoints")},
        "monitor": {"progress_bar": False},
    }
    (folder / "recipe.yaml").write_text(yaml.safe_dump(recipe))
    assert main(["retrofit", str(folder / "recipe.yaml")]) == 0
    return folder / "checkpoints" / "final"


@pytest.mark.parametrize("prompt", ["one small text", f"{TURN}one", f"{BEGIN}one", ""])
def test_goes_on_from_the_exported_tokenizers_ids(
    checkpoint: Path, capsys: pytest.CaptureFixture[str], prompt: str
) -> None:
    ids = AutoTokenizer.from_pretrained(checkpoint / "tokenizer")(prompt).input_ids
    loaded = load_model(checkpoint)
    steps = generate(loaded, torch.tensor([ids]), 9)
    expected = prompt + "".join(new_text(loaded.tokenizer, ids, (int(token[0]) for token in steps)))
    capsys.readouterr()
    assert main(["generate", str(checkpoint), "--prompt", prompt, "--max-new-tokens", "9", "--temperature", "0"]) == 0
    assert capsys.readouterr().out == expected + "\n"


@pytest.mark.parametrize("command", [["inspect"], ["generate", "--prompt", "a"]])
def test_an_absent_tokenizer_is_noticed_before_the_weights_are_read(
    checkpoint: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str], command: list[str]
) -> None:
    folder = tmp_path / "final"
    shutil.copytree(checkpoint, folder)
    shutil.rmtree(folder / "tokenizer")
    for path in folder.glob("*.distcp"):
        path.write_bytes(bytes(path.stat().st_size))
    assert main([*command, str(folder)]) == 1
    assert f"tokenizer {folder / 'tokenizer'} does not exist" in capsys.readouterr().err
