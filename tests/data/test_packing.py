"""Packed documents: where they begin, positions inside them, and no loss across their ends."""

import numpy
import pytest
import torch
from megatron.core.datasets.gpt_dataset import _get_ltor_masks_and_position_ids
from megatron.core.datasets.indexed_dataset import IndexedDatasetBuilder

from megatron_dmc.data import build_datasets, build_indexed_dataset, global_batch, heldout_windows
from tests.support.texts import TEXTS, data_config, stored_tokens

pytestmark = pytest.mark.usefixtures("one_process")


def naive_starts(tokens: torch.Tensor, end_of_document: int) -> torch.Tensor:
    """For documents that hold their end-of-document token at their end alone."""
    return torch.tensor([i == 0 or int(tokens[i - 1]) == end_of_document for i in range(len(tokens))])


@pytest.mark.parametrize("sequence_length", [2, 33, 150])
def test_samples_are_megatron_cores_reset_form(tmp_path, tokenizer, dataset, sequence_length):
    config = data_config(tmp_path, tokenizer, dataset, sequence_length=sequence_length, reset_at_documents=True)
    samples = range(0, 60)
    batch = global_batch(build_datasets(config, tokenizer, len(samples), 0)[0], samples)
    for i in samples:
        tokens = batch["tokens"][i]
        _, loss_mask, position_ids = _get_ltor_masks_and_position_ids(tokens, tokenizer.eod, True, True, True, False)
        assert torch.equal(batch["loss_mask"][i], loss_mask)
        assert torch.equal(batch["position_ids"][i], position_ids)
        assert torch.equal(batch["document_starts"][i], naive_starts(tokens, tokenizer.eod))
    assert batch["document_starts"].dtype == torch.bool
    assert batch["loss_mask"].eq(0).any() and batch["position_ids"].dtype == torch.int64


def test_only_masks_and_positions_depend_on_it(tmp_path, tokenizer, dataset):
    def batch(reset: bool) -> dict[str, torch.Tensor]:
        config = data_config(tmp_path, tokenizer, dataset, sequence_length=33, reset_at_documents=reset)
        return global_batch(build_datasets(config, tokenizer, 50, 0)[0], range(50))

    plain, reset = batch(False), batch(True)
    assert reset.keys() - plain.keys() == {"document_starts"}
    for name in ("tokens", "labels", "sample_index"):
        assert torch.equal(plain[name], reset[name])
    assert plain["loss_mask"].eq(1).all() and plain["position_ids"].eq(torch.arange(33)).all()


def test_blend(tmp_path, tokenizer, dataset):
    build_indexed_dataset(TEXTS[:9], tokenizer, tmp_path / "second")
    config = data_config(
        tmp_path, tokenizer, dataset, str(tmp_path / "second"), sequence_length=19, reset_at_documents=True
    )
    batch = global_batch(build_datasets(config, tokenizer, 70, 0)[0], range(70))
    for tokens, starts in zip(batch["tokens"], batch["document_starts"], strict=True):
        assert torch.equal(starts, naive_starts(tokens, tokenizer.eod))


def test_an_end_token_inside_a_document_begins_none(tmp_path, tokenizer):
    """As with a chat template that ends every turn with the token that ends a document."""
    end = tokenizer.eod
    builder = IndexedDatasetBuilder(str(tmp_path / "data.bin"), dtype=numpy.uint16)
    documents = [[100 + i, end, 150 + i, end] for i in range(40)] + [[], [end]]
    for document in documents:
        builder.add_item(torch.tensor(document, dtype=torch.int32))
        builder.end_document()
    builder.finalize(str(tmp_path / "data.idx"))
    config = data_config(tmp_path, tokenizer, str(tmp_path / "data"), sequence_length=9, reset_at_documents=True)
    batch = global_batch(build_datasets(config, tokenizer, 17, 0)[0], range(17))
    starts = batch["document_starts"]
    inside = torch.arange(9) > 0
    assert starts[(batch["tokens"] >= 100) & (batch["tokens"] < 150)].all()
    assert not starts[(batch["tokens"] >= 150) & inside].any()
    assert batch["loss_mask"][(batch["labels"] >= 100) & (batch["labels"] < 150)].eq(0).all()
    assert batch["loss_mask"][batch["labels"] >= 150].eq(1).all()


@pytest.mark.parametrize("sequence_length", [2, 33, 64])
def test_heldout_windows(tokenizer, dataset, sequence_length):
    windows = heldout_windows(dataset, sequence_length, tokenizer, reset_at_documents=True)
    batch = global_batch(windows, range(len(windows)))
    stream = torch.from_numpy(stored_tokens(dataset))
    for i in range(len(windows)):
        tokens = stream[i * sequence_length : (i + 1) * sequence_length]
        _, loss_mask, position_ids = _get_ltor_masks_and_position_ids(tokens, tokenizer.eod, True, True, True, False)
        assert torch.equal(batch["tokens"][i], tokens)
        assert torch.equal(batch["loss_mask"][i], loss_mask)
        assert torch.equal(batch["position_ids"][i], position_ids)
        assert torch.equal(batch["document_starts"][i], naive_starts(tokens, tokenizer.eod))
    assert "document_starts" not in heldout_windows(dataset, sequence_length, tokenizer)[0]
