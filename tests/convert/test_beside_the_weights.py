"""The small files beside a model's weights: damaged ones are refused by name, and a missing tokenizer is told of."""

import logging
import shutil
from collections.abc import Callable
from pathlib import Path

import pytest

from megatron_dmc.config import ConfigError
from megatron_dmc.convert.from_hf import import_hf
from megatron_dmc.convert.to_hf import export_hf

DAMAGED = [
    ("[]", "holds no JSON object"),
    ('"text"', "holds no JSON object"),
    ("{", "is not JSON"),
    ('{"n": ' + "9" * 5000 + "}", "holds a number of thousands of digits"),
    ("", "is not JSON"),
]


@pytest.mark.parametrize(("content", "problem"), DAMAGED)
@pytest.mark.parametrize(
    "name",
    [
        *("config.json", "generation_config.json", "model.safetensors.index.json"),
        *("tokenizer_config.json", "special_tokens_map.json", "added_tokens.json", "chat_template.json"),
    ],
)
def test_a_damaged_file_of_a_llama(
    save_llama: Callable[..., Path], tmp_path: Path, name: str, content: str, problem: str
) -> None:
    folder = save_llama(max_shard_size="20KB")
    (folder / name).write_text(content)
    with pytest.raises(ConfigError) as caught:
        import_hf(folder, tmp_path / "new")
    assert str(caught.value).startswith(f"{folder / name} {problem}")
    assert not list(tmp_path.iterdir())


@pytest.mark.parametrize(
    "name", ["generation_config.json", "tokenizer_config.json", "special_tokens_map.json", "added_tokens.json"]
)
def test_a_damaged_file_of_a_checkpoint(save_llama: Callable[..., Path], tmp_path: Path, name: str) -> None:
    import_hf(save_llama(), tmp_path / "checkpoint")
    path = tmp_path / "checkpoint" / "tokenizer" / name
    path.write_text("[]")
    with pytest.raises(ConfigError) as caught:
        export_hf(tmp_path / "checkpoint", tmp_path / "new")
    assert str(caught.value).startswith(f"{path} holds no JSON object")
    assert [path.name for path in tmp_path.iterdir()] == ["checkpoint"]


def test_a_model_without_a_tokenizer(
    save_llama: Callable[..., Path], tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    folder, checkpoint, output = save_llama(), tmp_path / "checkpoint", tmp_path / "output"
    with caplog.at_level(logging.WARNING):
        import_hf(folder, tmp_path / "whole")
        export_hf(tmp_path / "whole", tmp_path / "whole_again")
        assert not caplog.messages
        for path in folder.glob("*token*"):
            path.unlink()
        import_hf(folder, checkpoint)
        export_hf(checkpoint, output)
    assert caplog.messages == [
        f"warning: no tokenizer.json was copied, {folder} holds none: inspect and generate do not work with {checkpoint} "
        f"until a tokenizer is saved in {checkpoint}/tokenizer with save_pretrained; a recipe's data.tokenizer names "
        "one of its own",
        f"warning: no tokenizer was copied, {checkpoint} holds none: AutoTokenizer.from_pretrained does not work with "
        f"{output} until a tokenizer is saved there with save_pretrained",
    ]


def test_a_tokenizer_of_another_form(
    save_llama: Callable[..., Path], tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    """transformers reads it, this package does not."""
    folder, checkpoint = save_llama(), tmp_path / "checkpoint"
    shutil.move(folder / "tokenizer.json", folder / "tokenizer.model")
    with caplog.at_level(logging.WARNING):
        import_hf(folder, checkpoint)
        export_hf(checkpoint, tmp_path / "output")
    assert (tmp_path / "output" / "tokenizer.model").is_file()
    [message] = caplog.messages
    assert message.startswith(f"warning: no tokenizer.json was copied, {folder} holds none")
