"""Writing an indexed dataset."""

import json
import os
import sys
from collections.abc import Iterable, Iterator, Sequence
from contextlib import AbstractContextManager, contextmanager, suppress
from dataclasses import asdict, dataclass
from itertools import islice
from pathlib import Path
from typing import TypeVar

import numpy
import torch
from megatron.core.datasets.indexed_dataset import DType, IndexedDatasetBuilder
from rich.console import Console
from rich.progress import track

from megatron_dmc.config import ConfigError
from megatron_dmc.data.chat_template import RenderedChat
from megatron_dmc.data.indexed_dataset import MASK_SUFFIX, DatasetCounts
from megatron_dmc.data.tokenizer import Tokenizer

Document = TypeVar("Document")

_DOCUMENTS_PER_BATCH = 64
_MASK_FILES = (MASK_SUFFIX + ".bin", MASK_SUFFIX + ".idx")


@dataclass(frozen=True)
class StagedDataset:
    """A dataset that is whole, under temporary names beside its own.

    Attributes:
        prefix: the path that it is to have.
        temporary: the path that it has.
        suffixes: of its files; the index is the last one.
        counts: what it holds.
    """

    prefix: str
    temporary: str
    suffixes: tuple[str, ...]
    counts: DatasetCounts

    def place(self) -> None:
        """Gives the files their names; what stood there before is replaced. Raises ConfigError where that fails."""
        with _writing(self.prefix):
            # The index goes first and comes last: without it the others are no dataset.
            for suffix in (".idx", *_MASK_FILES):
                Path(self.prefix + suffix).unlink(missing_ok=True)
            for suffix in self.suffixes:
                os.replace(self.temporary + suffix, self.prefix + suffix)


def build_indexed_dataset(documents: Iterable[str], tokenizer: Tokenizer, prefix: str | Path) -> DatasetCounts:
    """Tokenizes documents into ``prefix.bin`` and ``prefix.idx`` (megatron-core's format) and ``prefix.json`` (counts).

    A document is what the tokenizer's post-processor makes of the text (often with a beginning-of-text token), and the
    end-of-document token. Tokens are uint16 where the vocabulary allows, else int32.
    Files appear under their names when they are whole; what stood there before is replaced. On a terminal a progress
    bar is shown.

    Raises:
        ConfigError: for no documents, or files that cannot be written (no folder, no space).
    """
    with stage_indexed_dataset(documents, tokenizer, prefix) as staged:
        staged.place()
    return staged.counts


def build_chat_dataset(chats: Iterable[RenderedChat], tokenizer: Tokenizer, prefix: str | Path) -> DatasetCounts:
    """:func:`build_indexed_dataset` of conversations, one a document, with the loss mask ``prefix.mask.bin`` and ``.idx``.

    The mask is 1 for every token that stands for any character of a chat's spans. An end-of-document token is added where
    the text does not end with one; it is not the assistant's.

    Raises:
        ConfigError: as build_indexed_dataset.
    """
    with stage_chat_dataset(chats, tokenizer, prefix) as staged:
        staged.place()
    return staged.counts


def stage_indexed_dataset(
    documents: Iterable[str], tokenizer: Tokenizer, prefix: str | Path
) -> AbstractContextManager[StagedDataset]:
    """:func:`build_indexed_dataset` up to the moment when the files get their names. What was not placed goes at the end."""

    def tokenized() -> Iterator[tuple[int, list[int], None]]:
        for batch in _batches(documents):
            for text, tokens in zip(batch, tokenizer.tokenize_documents(batch), strict=True):
                yield len(text.encode()), tokens, None

    return _staged(tokenized(), tokenizer, str(prefix), masked=False)


def stage_chat_dataset(
    chats: Iterable[RenderedChat], tokenizer: Tokenizer, prefix: str | Path
) -> AbstractContextManager[StagedDataset]:
    """:func:`build_chat_dataset` up to the moment when the files get their names. What was not placed goes at the end."""

    def tokenized() -> Iterator[tuple[int, list[int], list[int]]]:
        for batch in _batches(chats):
            encoded = tokenizer.tokenize_rendered([chat.text for chat in batch])
            for chat, (tokens, characters) in zip(batch, encoded, strict=True):
                mask = _overlap(characters, chat.spans)
                if tokens[-1] != tokenizer.eod:
                    tokens, mask = [*tokens, tokenizer.eod], [*mask, 0]
                yield len(chat.text.encode()), tokens, mask

    return _staged(tokenized(), tokenizer, str(prefix), masked=True)


def _overlap(characters: Sequence[tuple[int, int]], spans: Sequence[tuple[int, int]]) -> list[int]:
    begin, end = numpy.array(characters).T
    mask = numpy.zeros(len(characters), dtype=bool)
    for first, last in spans:
        # a token that a normalizer put in stands for no character, but in a place
        mask |= (begin < last) & (numpy.maximum(end, begin + 1) > first)
    return mask.astype(int).tolist()


def _batches(documents: Iterable[Document]) -> Iterator[list[Document]]:
    shown = track(
        documents, "tokenizing", console=Console(stderr=True), transient=True, disable=not sys.stderr.isatty()
    )
    while batch := list(islice(shown, _DOCUMENTS_PER_BATCH)):
        yield batch


@contextmanager
def _staged(
    documents: Iterator[tuple[int, list[int], list[int] | None]], tokenizer: Tokenizer, prefix: str, *, masked: bool
) -> Iterator[StagedDataset]:
    """Documents are (bytes of text, tokens, loss mask)."""
    temporary = f"{prefix}.tmp-{os.getpid()}"
    suffixes = (".bin", *(_MASK_FILES if masked else ()), ".json", ".idx")
    size = trained = 0
    builders: list[IndexedDatasetBuilder] = []
    try:
        with _writing(prefix):
            Path(prefix).parent.mkdir(parents=True, exist_ok=True)
            builders.append(IndexedDatasetBuilder(temporary + ".bin", dtype=DType.optimal_dtype(tokenizer.vocab_size)))
            if masked:
                builders.append(IndexedDatasetBuilder(temporary + MASK_SUFFIX + ".bin", dtype=numpy.uint8))
        for text_bytes, tokens, mask in documents:
            for builder, values in zip(builders, (tokens, mask), strict=False):
                with _writing(prefix):
                    builder.add_item(torch.tensor(values, dtype=torch.int32))
                builder.end_document()
            size += text_bytes
            trained += sum(mask or ())
        lengths = builders[0].sequence_lengths if builders else []
        if not lengths:
            raise ConfigError(f"there is no document to write to {prefix}; name a folder, a text file or a .jsonl file")
        counts = DatasetCounts(
            len(lengths), sum(lengths), size, tokenizer.vocabulary_digest, trained if masked else None
        )
        with _writing(prefix):
            for builder, suffix in zip(builders, (".idx", MASK_SUFFIX + ".idx"), strict=False):
                builder.finalize(temporary + suffix)
            Path(temporary + ".json").write_text(json.dumps(asdict(counts), indent=2) + "\n", encoding="utf-8")
            for suffix in suffixes:
                with open(temporary + suffix, "rb") as file:
                    os.fsync(file.fileno())
        yield StagedDataset(prefix, temporary, suffixes, counts)
    finally:
        # what failed before fails again here (a full disk), and is known already
        for builder in builders:
            with suppress(OSError):
                builder.data_file.close()
        for suffix in suffixes:
            with suppress(OSError):
                Path(temporary + suffix).unlink(missing_ok=True)


@contextmanager
def _writing(prefix: str) -> Iterator[None]:
    try:
        yield
    except OSError as error:
        raise ConfigError(f"cannot write the dataset {prefix}: {error.strerror or error}") from None
