"""A tokenizer and an indexed dataset of a few short texts."""

from pathlib import Path

import pytest

from megatron_dmc.data import build_indexed_dataset
from megatron_dmc.data.tokenizer import Tokenizer, train_tokenizer
from tests.support.texts import TEXTS


@pytest.fixture(scope="session")
def tokenizer(tmp_path_factory: pytest.TempPathFactory) -> Tokenizer:
    return train_tokenizer(TEXTS, 320, tmp_path_factory.mktemp("tokenizer"))


@pytest.fixture
def dataset(tmp_path: Path, tokenizer: Tokenizer) -> str:
    """The prefix of an indexed dataset of TEXTS."""
    build_indexed_dataset(TEXTS, tokenizer, tmp_path / "data" / "text")
    return str(tmp_path / "data" / "text")
