"""Writing an indexed dataset."""

import json
import os
import sys
from collections.abc import Iterable, Iterator
from contextlib import contextmanager, suppress
from dataclasses import asdict
from itertools import islice
from pathlib import Path

import torch
from megatron.core.datasets.indexed_dataset import DType, IndexedDatasetBuilder
from rich.console import Console
from rich.progress import track

from megatron_dmc.config import ConfigError
from megatron_dmc.training.data.indexed_dataset import DatasetCounts
from megatron_dmc.training.tokenizer import Tokenizer

_DOCUMENTS_PER_BATCH = 64
# The index goes first and comes last: without it the others are no dataset.
_SUFFIXES = (".bin", ".json", ".idx")


def build_indexed_dataset(documents: Iterable[str], tokenizer: Tokenizer, prefix: str | Path) -> DatasetCounts:
    """Tokenizes documents into ``prefix.bin`` and ``prefix.idx`` (megatron-core's format) and ``prefix.json`` (counts).

    Every document is followed by the end-of-document token. Tokens are uint16 where the vocabulary allows, else int32.
    Files appear under their names when they are whole; what stood there before is replaced. On a terminal a progress
    bar is shown.

    Raises:
        ConfigError: for no documents, or files that cannot be written (no folder, no space).
    """
    prefix = str(prefix)
    temporary = f"{prefix}.tmp-{os.getpid()}"
    size = 0
    builder = None
    try:
        with _writing(prefix):
            Path(prefix).parent.mkdir(parents=True, exist_ok=True)
            builder = IndexedDatasetBuilder(temporary + ".bin", dtype=DType.optimal_dtype(tokenizer.vocab_size))
        for text, tokens in _tokenized(documents, tokenizer):
            with _writing(prefix):
                builder.add_item(torch.tensor(tokens, dtype=torch.int32))
            builder.end_document()
            size += len(text.encode())
        lengths = builder.sequence_lengths
        if not lengths:
            raise ConfigError(f"there is no document to write to {prefix}; name a folder, a text file or a .jsonl file")
        counts = DatasetCounts(len(lengths), sum(lengths), size, tokenizer.vocabulary_digest)
        with _writing(prefix):
            builder.finalize(temporary + ".idx")
            Path(temporary + ".json").write_text(json.dumps(asdict(counts), indent=2) + "\n", encoding="utf-8")
            for suffix in _SUFFIXES:
                with open(temporary + suffix, "rb") as file:
                    os.fsync(file.fileno())
            Path(prefix + ".idx").unlink(missing_ok=True)
            for suffix in _SUFFIXES:
                os.replace(temporary + suffix, prefix + suffix)
    finally:
        # what failed before fails again here (a full disk), and is known already
        if builder is not None:
            with suppress(OSError):
                builder.data_file.close()
        for suffix in _SUFFIXES:
            with suppress(OSError):
                Path(temporary + suffix).unlink(missing_ok=True)
    return counts


def _tokenized(documents: Iterable[str], tokenizer: Tokenizer) -> Iterator[tuple[str, list[int]]]:
    shown = track(
        documents, "tokenizing", console=Console(stderr=True), transient=True, disable=not sys.stderr.isatty()
    )
    while batch := list(islice(shown, _DOCUMENTS_PER_BATCH)):
        for text, tokens in zip(batch, tokenizer.tokenize_batch(batch), strict=True):
            yield text, [*tokens, tokenizer.eod]


@contextmanager
def _writing(prefix: str) -> Iterator[None]:
    try:
        yield
    except OSError as error:
        raise ConfigError(f"cannot write the dataset {prefix}: {error.strerror or error}") from None
