"""Held-out windows."""

import os

import pytest
import torch

from megatron_dmc.data import global_batch, heldout_windows
from megatron_dmc.data.indexed_dataset import read_index
from tests.support.texts import TEXTS, fails, stored_tokens


@pytest.mark.parametrize("sequence_length", [2, 33, 64])
def test_windows_cover_the_stream(tokenizer, dataset, sequence_length):
    windows = heldout_windows(dataset, sequence_length, tokenizer)
    stream = torch.from_numpy(stored_tokens(dataset))
    count = (len(stream) - 1) // sequence_length
    assert len(windows) == count
    batch = global_batch(windows, range(count))
    assert torch.equal(batch["tokens"].flatten(), stream[: count * sequence_length])
    assert torch.equal(batch["labels"].flatten(), stream[1 : count * sequence_length + 1])
    assert batch["loss_mask"].dtype == torch.float32 and batch["loss_mask"].eq(1).all()
    with pytest.raises(IndexError):
        windows[count]


def test_bytes_per_token_with_and_without_counts(tokenizer, dataset):
    expected = len("".join(TEXTS).encode()) / read_index(dataset).tokens
    assert heldout_windows(dataset, 16, tokenizer).bytes_per_token == pytest.approx(expected, rel=1e-12)
    os.unlink(dataset + ".json")
    assert heldout_windows(dataset, 16, tokenizer).bytes_per_token == pytest.approx(expected, rel=1e-12)


def test_too_short(tokenizer, dataset):
    fails("too few for one sample", heldout_windows, dataset, 100_000, tokenizer)
