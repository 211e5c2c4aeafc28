"""Held-out text as windows that follow one another."""

import numpy
import torch

from megatron_dmc.data.indexed_dataset import (
    MASK_SUFFIX,
    DatasetIndex,
    check_dataset,
    has_loss_mask,
    read_counts,
    read_index,
    token_stream,
)
from megatron_dmc.data.packing import packed_sample
from megatron_dmc.data.tokenizer import Tokenizer


class HeldoutWindows:
    """A dataset's whole token stream in its own order, cut into windows that follow one another without overlap.

    Window i predicts tokens i * s + 1 to (i + 1) * s of the stream (s = sequence_length), so every token after the
    first is predicted once; the remainder that fills no window is dropped. Reads like a PackedDataset.

    Attributes:
        bytes_per_token: UTF-8 bytes of text per token of the whole dataset; the tokens that open and close a document count
            as tokens.
    """

    def __init__(
        self,
        stream: numpy.ndarray,
        sequence_length: int,
        bytes_per_token: float,
        *,
        trained: numpy.ndarray | None = None,
        starts: numpy.ndarray | None = None,
    ) -> None:
        self.sequence_length = sequence_length
        self.bytes_per_token = bytes_per_token
        self._stream = stream
        self._trained = trained
        self._starts = starts

    def __len__(self) -> int:
        return (len(self._stream) - 1) // self.sequence_length

    def __getitem__(self, idx: int) -> dict[str, torch.Tensor]:
        """A sample of :func:`packed_sample`, of ``sequence_length`` tokens."""
        if not 0 <= idx < len(self):
            raise IndexError(f"window {idx} is outside {len(self)} windows")
        begin = idx * self.sequence_length
        end = begin + self.sequence_length + 1
        trained = None if self._trained is None else self._trained[begin:end] != 0
        starts = None
        if self._starts is not None:
            starts = numpy.zeros(end - begin, dtype=bool)
            low, high = numpy.searchsorted(self._starts, (begin, end))
            starts[self._starts[low:high] - begin] = True
        return packed_sample(self._stream[begin:end], trained, starts)


def heldout_windows(
    prefix: str, sequence_length: int, tokenizer: Tokenizer, *, reset_at_documents: bool = False
) -> HeldoutWindows:
    """The windows of one held-out dataset, with its loss mask where it has one.

    Args:
        reset_at_documents: as in the recipe's data.

    Raises:
        ConfigError: for anything :func:`check_dataset` finds.
    """
    index = check_dataset(prefix, tokenizer, sequence_length)
    counts = read_counts(prefix, index)
    stream = token_stream(prefix, index)
    bytes_per_token = counts.bytes_per_token if counts else _bytes_per_token(stream, index, tokenizer)
    trained = None
    if has_loss_mask(prefix):
        trained = token_stream(prefix + MASK_SUFFIX, read_index(prefix + MASK_SUFFIX))
    starts = None
    if reset_at_documents:
        lengths = index.document_lengths
        # the start of an empty one is the next one's, or the end of the stream
        starts = numpy.unique((numpy.cumsum(lengths) - lengths)[lengths > 0])
    return HeldoutWindows(stream, sequence_length, bytes_per_token, trained=trained, starts=starts)


def _bytes_per_token(stream: numpy.ndarray, index: DatasetIndex, tokenizer: Tokenizer) -> float:
    before, after = tokenizer.added_tokens
    size = 0
    for document in numpy.split(stream, numpy.cumsum(index.document_lengths)[:-1]):
        text = document[~numpy.isin(document, [*before, *after, tokenizer.eod])]
        size += len(tokenizer.detokenize(text).encode())
    return size / index.tokens
