"""Random tiny Llamas, and a tokenizer."""

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from megatron_dmc.data.tokenizer import train_tokenizer
from tests.support.llamas import save_random_base


@pytest.fixture(scope="session", autouse=True)
def process(one_process: None) -> None:
    """Every test here is a conversion's, in a world of one process."""


@pytest.fixture(scope="session")
def tokenizer_folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("tokenizer")
    train_tokenizer(["one small text about one small text"], 280, folder)
    return folder


@pytest.fixture(scope="session")
def save_llama(tmp_path_factory: pytest.TempPathFactory, tokenizer_folder: Path) -> Callable[..., Path]:
    """Saves a random Llama and the tokenizer in a new folder; keyword arguments are save_random_base's."""

    def save(**settings: Any) -> Path:
        folder = tmp_path_factory.mktemp("llama")
        save_random_base(folder, **settings)
        for path in tokenizer_folder.iterdir():
            (folder / path.name).write_bytes(path.read_bytes())
        return folder

    return save
