"""Held-out text as windows that follow one another."""

import numpy
import torch

from megatron_dmc.training.data.indexed_dataset import DatasetIndex, check_dataset, read_counts, token_stream
from megatron_dmc.training.tokenizer import Tokenizer


class HeldoutWindows:
    """A dataset's whole token stream in its own order, cut into windows that follow one another without overlap.

    Window i predicts tokens i * s + 1 to (i + 1) * s of the stream (s = sequence_length), so every token after the
    first is predicted once; the remainder that fills no window is dropped. Reads like a GPTDataset.

    Attributes:
        bytes_per_token: UTF-8 bytes of text per token of the whole dataset, end-of-document tokens counted as tokens.
    """

    def __init__(self, stream: numpy.ndarray, sequence_length: int, bytes_per_token: float) -> None:
        self.sequence_length = sequence_length
        self.bytes_per_token = bytes_per_token
        self._stream = stream

    def __len__(self) -> int:
        return (len(self._stream) - 1) // self.sequence_length

    def __getitem__(self, idx: int) -> dict[str, torch.Tensor]:
        """int64 ``tokens``, ``labels``, ``position_ids`` and float32 ``loss_mask`` (ones), each [sequence_length]."""
        if not 0 <= idx < len(self):
            raise IndexError(f"window {idx} is outside {len(self)} windows")
        start = idx * self.sequence_length
        text = torch.from_numpy(self._stream[start : start + self.sequence_length + 1].astype(numpy.int64))
        return {
            "tokens": text[:-1],
            "labels": text[1:],
            "loss_mask": torch.ones(self.sequence_length),
            "position_ids": torch.arange(self.sequence_length),
        }


def heldout_windows(prefix: str, sequence_length: int, tokenizer: Tokenizer) -> HeldoutWindows:
    """The windows of one held-out dataset.

    Raises:
        ConfigError: for anything :func:`check_dataset` finds.
    """
    index = check_dataset(prefix, tokenizer, sequence_length)
    counts = read_counts(prefix, index)
    stream = token_stream(prefix, index)
    bytes_per_token = counts.bytes_per_token if counts else _bytes_per_token(stream, index, tokenizer)
    return HeldoutWindows(stream, sequence_length, bytes_per_token)


def _bytes_per_token(stream: numpy.ndarray, index: DatasetIndex, tokenizer: Tokenizer) -> float:
    size = 0
    for document in numpy.split(stream, numpy.cumsum(index.sequence_lengths)[:-1]):
        size += len(tokenizer.detokenize(document[document != tokenizer.eod]).encode())
    return size / index.tokens
