"""Texts, the settings of a dataset of them, errors in one line, and a full disk."""

import os
import resource
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import numpy
import pytest
from megatron.core.datasets.indexed_dataset import IndexedDataset

from megatron_dmc.config import ConfigError
from megatron_dmc.data.tokenizer import Tokenizer
from megatron_dmc.recipe import DataConfig

TEXTS = [
    f"def function_{i}(x):\n    return x + {i * i}  # größer 日本 {'🙂' * (i % 3)}\n" * (i % 4 + 1) for i in range(40)
]


def data_config(
    folder: Path, tokenizer: Tokenizer, *train: str, sequence_length: int = 32, **keywords: Any
) -> DataConfig:
    return DataConfig(
        train=list(train),
        tokenizer=str(tokenizer.folder),
        sequence_length=sequence_length,
        cache=str(folder / "cache"),
        **keywords,
    )


def stored_tokens(prefix: str) -> numpy.ndarray:
    """All tokens, int64, copied: the dataset unmaps its file when it is collected."""
    stored = IndexedDataset(prefix)
    return numpy.concatenate([stored[i] for i in range(len(stored))]).astype(numpy.int64)


def fails(message: str, call: Callable[..., object], *arguments: Any, **keywords: Any) -> None:
    with pytest.raises(ConfigError, match=message) as caught:
        call(*arguments, **keywords)
    assert "\n" not in str(caught.value)


@contextmanager
def full_disk(size: int) -> Iterator[None]:
    """Writing a file beyond ``size`` bytes fails in this process, as it does on a full disk."""
    soft, hard = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (size, hard))
    try:
        yield
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, (soft, hard))


@contextmanager
def without_privileges() -> Iterator[None]:
    """Permissions bind this process, also where root runs it. Name paths from the working folder: others may be hidden."""
    before = os.geteuid()
    if before == 0:
        os.seteuid(65534)
    try:
        yield
    finally:
        os.seteuid(before)
