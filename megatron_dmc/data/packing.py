"""Documents packed one after another: where each begins inside a sample, and which of its tokens count in the loss."""

from typing import Any

import numpy
import torch
from megatron.core.datasets.gpt_dataset import GPTDataset, GPTDatasetConfig
from megatron.core.datasets.indexed_dataset import IndexedDataset

from megatron_dmc.data.indexed_dataset import (
    MASK_SUFFIX,
    has_loss_mask,
    has_several_sequences,
    lengths_of_documents,
)

# Above any token's bits.
_TRAINED, _STARTS = 1 << 32, 1 << 33


class PackedDataset(GPTDataset):
    """megatron-core's samples, with the loss mask that stands beside the tokens (chat data) and with documents' starts.

    Which tokens make a sample is GPTDataset's own business: its indices, order and caches are used as they are. Where
    ``reset_position_ids`` is set, samples are :func:`packed_sample`'s with starts; a start is a document's true first
    token, not whatever follows an end-of-document token: some chat templates end every turn with that token.
    """

    @staticmethod
    def build_low_level_dataset(dataset_path: str, config: GPTDatasetConfig) -> IndexedDataset:
        return FlaggedTokens(dataset_path, mmap=config.mmap_bin_files)

    def __getitem__(self, idx: int) -> dict[str, torch.Tensor]:
        """One sample of :func:`packed_sample`."""
        # megatron-core >= 0.17 returns the documents' lengths as well.
        flagged, *_ = self._query_document_sample_shuffle_indices(idx)
        return packed_sample(
            flagged & (_TRAINED - 1),
            (flagged & _TRAINED) != 0,
            (flagged & _STARTS) != 0 if self.config.reset_position_ids else None,
        )


class FlaggedTokens(IndexedDataset):
    """A dataset of documents whose tokens carry, in bits of their own, what else a sample must know about them.

    So a sample's mask is read from the very spans that its tokens are read from.
    """

    def initialize(self, path_prefix: str, *arguments: Any, **keywords: Any) -> None:
        super().initialize(path_prefix, *arguments, **keywords)
        masked = has_loss_mask(path_prefix)
        self.loss_mask = IndexedDataset(path_prefix + MASK_SUFFIX, mmap=self.mmap) if masked else None
        _join_sequences(self.index)
        if self.loss_mask is not None:
            _join_sequences(self.loss_mask.index)

    def get(self, idx: int, offset: int = 0, length: int | None = None) -> numpy.ndarray:
        """int64 [length] tokens of document ``idx`` from ``offset`` on, with their flags."""
        tokens = super().get(idx, offset, length).astype(numpy.int64)
        if self.loss_mask is None:
            tokens |= _TRAINED
        else:
            tokens |= self.loss_mask.get(idx, offset, length).astype(numpy.int64) * _TRAINED
        if offset == 0:
            tokens[:1] |= _STARTS
        return tokens


def _join_sequences(index: Any) -> None:
    """Has every document stored in one sequence: GPTDataset shuffles and cuts sequences, whatever document they are of."""
    boundaries = index.document_indices
    if not has_several_sequences(boundaries):
        return
    lengths = lengths_of_documents(index.sequence_lengths, boundaries)
    index.sequence_lengths = lengths.astype(numpy.int32)
    # read_index saw that sequences lie one after another
    index.sequence_pointers = (numpy.cumsum(lengths) - lengths) * index.dtype_size
    index.document_indices = numpy.arange(len(boundaries))
    index.sequence_count = len(lengths)


def packed_sample(
    text: numpy.ndarray, trained: numpy.ndarray | None, starts: numpy.ndarray | None
) -> dict[str, torch.Tensor]:
    """A sample of s tokens and their successors.

    Args:
        text: token ids [s + 1].
        trained: bool [s + 1], which tokens the model learns to predict; None: all.
        starts: bool [s + 1], documents' first tokens; None: positions run on across documents, and so does the loss.

    Returns:
        int64 ``tokens``, ``labels``, ``position_ids`` [s] and float32 ``loss_mask`` [s]. With ``starts`` also bool
        ``document_starts`` [s], true at the row's first token too; positions begin at 0 in every document, and predicting
        a document's first token from the one before does not count.
    """
    text = text.astype(numpy.int64)
    size = len(text) - 1
    counts = numpy.ones(size, dtype=bool) if trained is None else trained[1:]
    positions = numpy.arange(size)
    sample = {"tokens": torch.from_numpy(text[:-1]), "labels": torch.from_numpy(text[1:])}
    if starts is not None:
        counts = counts & ~starts[1:]
        first = starts[:-1].copy()
        first[0] = True
        positions = positions - numpy.maximum.accumulate(numpy.where(first, positions, 0))
        sample["document_starts"] = torch.from_numpy(first)
    sample["loss_mask"] = torch.from_numpy(counts.astype(numpy.float32))
    sample["position_ids"] = torch.from_numpy(positions)
    return sample
