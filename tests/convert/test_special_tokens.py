"""Special tokens: what transformers loads and generates with is kept, what is no token of the model is refused at once."""

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from transformers import AutoModelForCausalLM

from megatron_dmc.config import ConfigError
from megatron_dmc.convert.from_hf import import_hf
from megatron_dmc.convert.to_hf import export_hf

VOCABULARY = 300
GOOD: list[dict[str, Any]] = [
    {"pad_token_id": 0},
    {"pad_token_id": VOCABULARY - 1, "eos_token_id": [0, VOCABULARY - 1]},
    {"pad_token_id": None, "bos_token_id": None},
    {"eos_token_id": [7]},
]
BAD: list[dict[str, Any]] = [
    *({name: value} for name in ("bos_token_id", "eos_token_id", "pad_token_id") for value in (VOCABULARY, 32000, -1)),
    *({"pad_token_id": value} for value in (True, 2.0, "2", "<pad>", [2], [], {})),
    *({"bos_token_id": value} for value in ([1], "1", False)),
    *({"eos_token_id": value} for value in ([], [2, VOCABULARY], [2, -1], [2, None], ["2"], [True], [[2]], 2.0)),
]


def change(path: Path, **tokens: Any) -> None:
    path.write_text(json.dumps(json.loads(path.read_text()) | tokens))


@pytest.mark.parametrize("file", ["config.json", "generation_config.json"])
@pytest.mark.parametrize("tokens", GOOD, ids=str)
def test_what_is_a_token_is_kept(
    save_llama: Callable[..., Path], tmp_path: Path, tokens: dict[str, Any], file: str
) -> None:
    folder = save_llama(eos_token_id=5, bos_token_id=4)
    (folder / "generation_config.json").write_text("{}")
    change(folder / file, **tokens)
    import_hf(folder, tmp_path / "megatron")
    export_hf(tmp_path / "megatron", tmp_path / "hf")
    prompt = torch.tensor([[5, 6, 7], [8, 9, 10]])
    model = AutoModelForCausalLM.from_pretrained(tmp_path / "hf")
    for name, value in tokens.items():
        if value is not None:
            assert getattr(model.config, name) == getattr(model.generation_config, name) == value
    model.generate(prompt, attention_mask=torch.ones_like(prompt), max_new_tokens=3, do_sample=False)


@pytest.mark.parametrize("file", ["config.json", "generation_config.json"])
@pytest.mark.parametrize("tokens", BAD, ids=str)
def test_what_is_no_token_is_refused_at_import(
    save_llama: Callable[..., Path], tmp_path: Path, tokens: dict[str, Any], file: str
) -> None:
    folder = save_llama()
    change(folder / file, **tokens)
    ((name, value),) = tokens.items()
    with pytest.raises(ConfigError) as error:
        import_hf(folder, tmp_path / "megatron")
    message = str(error.value)
    assert message.startswith(f"{folder / file}: {name} must be null or a token of the model, 0 to 299")
    assert f"got {value!r}" in message and "set it to null" in message and "\n" not in message
    assert not list(tmp_path.iterdir())


def test_other_special_tokens_of_generation(save_llama: Callable[..., Path], tmp_path: Path) -> None:
    folder = save_llama()
    change(folder / "generation_config.json", forced_eos_token_id=[3, 4], decoder_start_token_id=None)
    import_hf(folder, tmp_path / "megatron")
    change(folder / "generation_config.json", forced_eos_token_id=VOCABULARY)
    with pytest.raises(ConfigError, match="forced_eos_token_id must be null or a token"):
        import_hf(folder, tmp_path / "again")


def test_a_checkpoint_that_has_one_can_be_mended(save_llama: Callable[..., Path], tmp_path: Path) -> None:
    """From an earlier version, or with the tokenizer of another folder: what was trained is not lost."""
    import_hf(save_llama(), tmp_path / "megatron")
    file = tmp_path / "megatron" / "tokenizer" / "generation_config.json"
    change(file, pad_token_id=32000)
    with pytest.raises(ConfigError, match=f"{file}: pad_token_id must be null .*got 32000; set it to null"):
        export_hf(tmp_path / "megatron", tmp_path / "hf")
    change(file, pad_token_id=None)
    export_hf(tmp_path / "megatron", tmp_path / "hf")
