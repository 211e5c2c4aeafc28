"""Random tiny Llamas, and a tokenizer."""

from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from transformers import LlamaConfig, LlamaForCausalLM

from megatron_dmc.convert.single_process import single_process
from megatron_dmc.data.tokenizer import train_tokenizer


@pytest.fixture(scope="session", autouse=True)
def one_thread() -> None:
    torch.set_num_threads(1)


@pytest.fixture(scope="session", autouse=True)
def process() -> Iterator[None]:
    with single_process():
        yield


@pytest.fixture(scope="session")
def tokenizer_folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("tokenizer")
    train_tokenizer(["one small text about one small text"], 280, folder)
    return folder


@pytest.fixture(scope="session")
def save_llama(tmp_path_factory: pytest.TempPathFactory, tokenizer_folder: Path) -> Callable[..., Path]:
    """Saves a random Llama and the tokenizer in a new folder; keyword arguments are LlamaConfig's."""

    def save(*, seed: int = 0, max_shard_size: str = "5GB", **overrides: Any) -> Path:
        settings: dict[str, Any] = {
            "vocab_size": 300,
            "hidden_size": 32,
            "intermediate_size": 48,
            "num_hidden_layers": 2,
            "num_attention_heads": 4,
            "num_key_value_heads": 2,
            "max_position_embeddings": 128,
            "rms_norm_eps": 1e-5,
            "initializer_range": 0.2,
            "dtype": torch.float32,
        }
        torch.manual_seed(seed)
        config = LlamaConfig(**(settings | overrides))
        model = LlamaForCausalLM(config).to(config.dtype)
        with torch.no_grad():
            for name, parameter in model.named_parameters():
                if "norm" in name:
                    parameter.uniform_(0.5, 1.5)
        folder = tmp_path_factory.mktemp("llama")
        model.save_pretrained(folder, max_shard_size=max_shard_size)
        for path in tokenizer_folder.iterdir():
            (folder / path.name).write_bytes(path.read_bytes())
        return folder

    return save
