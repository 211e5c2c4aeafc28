"""Chat datasets on disk and the samples made of them, against masks built turn by turn."""

import json
import os
import shutil
from pathlib import Path

import numpy
import pytest
import torch
from megatron.core.datasets.indexed_dataset import IndexedDataset, IndexedDatasetBuilder

from megatron_dmc.data import (
    build_chat_dataset,
    build_datasets,
    build_indexed_dataset,
    global_batch,
    heldout_windows,
    load_chat_template,
)
from megatron_dmc.data.chat import Conversation
from megatron_dmc.data.indexed_dataset import check_dataset, content_digest, read_index
from tests.support.chats import PLAIN, chat_tokenizer, conversations, naive_document
from tests.support.texts import data_config, fails, full_disk, stored_tokens

pytestmark = pytest.mark.usefixtures("one_process")

CHATS = conversations(40)


@pytest.fixture(scope="module")
def tokenizer(tmp_path_factory):
    return chat_tokenizer(tmp_path_factory.mktemp("tokenizer"))


@pytest.fixture(scope="module")
def whole(tmp_path_factory, tokenizer):
    return build(tmp_path_factory.mktemp("chat") / "chat", tokenizer, CHATS)


@pytest.fixture
def dataset(tmp_path, whole):
    """A copy, to damage."""
    shutil.copytree(Path(whole).parent, tmp_path / "data")
    return str(tmp_path / "data" / "chat")


def build(prefix, tokenizer, chats):
    render = load_chat_template(tokenizer).render
    build_chat_dataset((render(Conversation(chat, "here")) for chat in chats), tokenizer, prefix)
    return str(prefix)


def naive_samples(dataset, documents):
    """Tokens and masks of a PackedDataset's samples: the documents laid end to end in its order, cut every s tokens."""
    order = [int(i) for i in dataset.document_index]
    size = dataset.config.sequence_length
    tokens, mask, starts = [], [], []
    for i in order:
        tokens += documents[i][0]
        mask += documents[i][1]
        starts += [True] + [False] * (len(documents[i][0]) - 1)
    for k in dataset.shuffle_index:
        piece = slice(int(k) * size, (int(k) + 1) * size + 1)
        yield torch.tensor(tokens[piece]), torch.tensor(mask[piece]), torch.tensor(starts[piece])


def check_samples(dataset, samples, reset):
    for i, (tokens, mask, starts) in enumerate(samples):
        sample = dataset[i]
        counts = mask[1:].clone()
        if reset:
            counts[starts[1:]] = 0
            starts[0] = True
            assert sample["document_starts"].tolist() == starts[:-1].tolist()
        assert torch.equal(sample["tokens"], tokens[:-1]) and torch.equal(sample["labels"], tokens[1:])
        assert torch.equal(sample["loss_mask"], counts.float())


def test_tokens_mask_and_counts(tokenizer, whole):
    expected = [naive_document(tokenizer, chat) for chat in CHATS]
    tokens, mask = IndexedDataset(whole), IndexedDataset(whole + ".mask")
    assert [tokens[i].tolist() for i in range(len(tokens))] == [document[0] for document in expected]
    assert [mask[i].tolist() for i in range(len(mask))] == [document[1] for document in expected]
    counts = json.loads(Path(whole + ".json").read_text())
    assert counts["trained_tokens"] == sum(sum(document[1]) for document in expected)
    assert counts["tokens"] == sum(len(document[0]) for document in expected) == read_index(whole).tokens
    files = ["chat.bin", "chat.idx", "chat.json", "chat.mask.bin", "chat.mask.idx"]
    assert sorted(os.listdir(Path(whole).parent)) == files


def test_no_second_end_of_document(tmp_path, tokenizer):
    (tmp_path / "template").write_text(PLAIN.replace("<|im_end|>\n", "<|endoftext|>"))
    template = load_chat_template(tokenizer, tmp_path / "template")
    chat = Conversation(CHATS[1], "here")
    build_chat_dataset([template.render(chat)], tokenizer, tmp_path / "chat")
    tokens, mask = (stored_tokens(str(tmp_path / name)) for name in ("chat", "chat.mask"))
    # As Llama 2's: every turn of the assistant ends with it, and the model has to learn to write it.
    turns = sum(turn["role"] == "assistant" for turn in CHATS[1])
    assert mask[tokens == tokenizer.eod].sum() == turns and tokens[-2] != tokenizer.eod == tokens[-1]


@pytest.mark.parametrize("sequence_length", [2, 37, 300])
@pytest.mark.parametrize("reset", [False, True], ids=["running-on", "reset"])
def test_samples_equal_the_naive_ones(tmp_path, tokenizer, whole, sequence_length, reset):
    documents = [naive_document(tokenizer, chat) for chat in CHATS]
    config = data_config(tmp_path, tokenizer, whole, sequence_length=sequence_length, reset_at_documents=reset)
    train, _ = build_datasets(config, tokenizer, 60, 0)
    check_samples(train, naive_samples(train, documents), reset)
    again, _ = build_datasets(config, tokenizer, 60, 0)
    later, first = (global_batch(made, range(31, 60)) for made in (again, train))
    assert all(torch.equal(later[name], first[name]) for name in first)


def test_blend_with_plain_text(tmp_path, tokenizer, whole):
    texts = [f"Plain text number {i}. " * (i % 5 + 1) for i in range(50)]
    build_indexed_dataset(texts, tokenizer, tmp_path / "text")
    chats = [naive_document(tokenizer, chat) for chat in CHATS]
    plain = [[*tokenizer.tokenize(text), tokenizer.eod] for text in texts]
    documents = [chats, [(tokens, [1] * len(tokens)) for tokens in plain]]
    config = data_config(
        tmp_path, tokenizer, whole, str(tmp_path / "text"), sequence_length=37, reset_at_documents=True
    )
    train, _ = build_datasets(config, tokenizer, 90, 0)
    naive = [list(naive_samples(part, of)) for part, of in zip(train.datasets, documents, strict=True)]
    parts, places = train.dataset_index, train.dataset_sample_index
    check_samples(train, [naive[parts[i]][places[i]] for i in range(90)], True)
    assert set(parts[:90].tolist()) == {0, 1}


def test_heldout_windows(tokenizer, whole):
    mask = [value for chat in CHATS for value in naive_document(tokenizer, chat)[1]]
    windows = heldout_windows(whole, 37, tokenizer)
    for i in range(len(windows)):
        assert windows[i]["loss_mask"].tolist() == mask[i * 37 + 1 : (i + 1) * 37 + 1]
    document = naive_document(tokenizer, CHATS[0])[0]
    reset = heldout_windows(whole, len(document) + 5, tokenizer, reset_at_documents=True)[0]
    assert reset["document_starts"].nonzero().flatten().tolist() == [0, len(document)]


def write_mask(prefix, lengths, dtype=numpy.uint8):
    builder = IndexedDatasetBuilder(prefix + ".mask.bin", dtype=dtype)
    for length in lengths:
        builder.add_item(torch.ones(length, dtype=torch.int32))
        builder.end_document()
    builder.finalize(prefix + ".mask.idx")


def test_a_mask_of_other_lengths_or_type(tokenizer, dataset):
    lengths = read_index(dataset).document_lengths.tolist()
    write_mask(dataset, lengths)
    check_dataset(dataset, tokenizer, 8)
    # As many values, in other documents.
    for wrong in (lengths[:-1], [*lengths[:-1], lengths[-1] + 1], [lengths[0] + 1, lengths[1] - 1, *lengths[2:]]):
        write_mask(dataset, wrong)
        fails(r"chat\.mask\.idx is not the loss mask of", check_dataset, dataset, tokenizer, 8)
    write_mask(dataset, lengths, numpy.int16)
    fails(r"chat\.mask\.idx is not the loss mask of", check_dataset, dataset, tokenizer, 8)


@pytest.mark.parametrize("suffix", [".mask.idx", ".mask.bin"])
def test_a_truncated_or_missing_mask(tokenizer, dataset, suffix):
    path = Path(dataset + suffix)
    path.write_bytes(path.read_bytes()[:-3])
    fails(r"chat\.mask\.(idx|bin) has \d+ bytes where", check_dataset, dataset, tokenizer, 8)
    path.unlink()
    fails(r"chat\.mask\.(idx is missing|bin)", check_dataset, dataset, tokenizer, 8)


def test_a_mask_beside_a_dataset_that_has_none(tmp_path, tokenizer, dataset):
    build_indexed_dataset(["text"] * 9, tokenizer, dataset)
    # The mask of the chat data was removed with it.
    assert sorted(os.listdir(Path(dataset).parent)) == ["chat.bin", "chat.idx", "chat.json"]
    write_mask(dataset, read_index(dataset).document_lengths.tolist())
    fails(
        r"chat\.json: the loss mask .* stands beside it, which says nothing of one",
        check_dataset,
        dataset,
        tokenizer,
        8,
    )


def test_without_counts_the_mask_is_read(tmp_path, tokenizer, dataset):
    Path(dataset + ".json").unlink()
    train, _ = build_datasets(data_config(tmp_path, tokenizer, dataset), tokenizer, 20, 0)
    assert 0 < global_batch(train, range(20))["loss_mask"].mean() < 1


def test_content_digest_knows_the_mask(dataset, whole):
    first = content_digest(dataset)
    assert first == content_digest(whole)
    path = Path(dataset + ".mask.bin")
    content = path.read_bytes()
    path.write_bytes(bytes([1 - content[0]]) + content[1:])
    assert content_digest(dataset) != first


def test_full_disk_leaves_nothing(tmp_path, tokenizer):
    with full_disk(3000):
        fails("cannot write the dataset", build, tmp_path / "chat", tokenizer, CHATS * 9)
    assert os.listdir(tmp_path) == []
