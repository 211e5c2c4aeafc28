"""Indexed datasets, written and read back, whole and damaged."""

import json
import os
import struct
from pathlib import Path

import numpy
import pytest
import torch
from megatron.core.datasets.indexed_dataset import IndexedDataset, IndexedDatasetBuilder

from megatron_dmc.data import build_indexed_dataset, iter_documents
from megatron_dmc.data.indexed_dataset import check_dataset, content_digest, read_index
from megatron_dmc.data.tokenizer import load_tokenizer, train_tokenizer
from tests.support.texts import TEXTS, fails


def test_tokens_and_counts(tmp_path, tokenizer, dataset):
    stored = IndexedDataset(dataset)
    assert len(stored) == len(TEXTS)
    for text, ids in zip(TEXTS, stored, strict=False):
        assert ids.tolist() == [*tokenizer.tokenize(text), tokenizer.eod]
    assert stored.index.dtype is numpy.uint16
    index = read_index(dataset)
    counts = json.loads(Path(dataset + ".json").read_text())
    assert counts["documents"] == index.documents == len(TEXTS)
    assert counts["tokens"] == index.tokens == sum(stored.sequence_lengths)
    assert counts["bytes"] == len("".join(TEXTS).encode())
    assert sorted(os.listdir(Path(dataset).parent)) == ["text.bin", "text.idx", "text.json"]


def test_large_vocabulary_is_int32(tmp_path):
    from tokenizers import Tokenizer, models, pre_tokenizers

    backend = Tokenizer(models.WordLevel({f"w{i}": i for i in range(70_000)}, unk_token="w0"))
    backend.pre_tokenizer = pre_tokenizers.WhitespaceSplit()
    backend.add_special_tokens(["</s>"])
    backend.save(str(tmp_path / "tokenizer.json"))
    large = load_tokenizer(tmp_path)
    build_indexed_dataset(["w69999 w5"], large, tmp_path / "text")
    stored = IndexedDataset(str(tmp_path / "text"))
    assert stored.index.dtype is numpy.int32 and stored[0].tolist() == [69_999, 5, 70_000]


def test_no_documents(tmp_path, tokenizer):
    fails("there is no document to write", build_indexed_dataset, [], tokenizer, tmp_path / "text")
    assert os.listdir(tmp_path) == []


def test_failing_documents_leave_what_was_there(tmp_path, tokenizer, dataset):
    before = {path.name: path.read_bytes() for path in Path(dataset).parent.iterdir()}
    (tmp_path / "bad.jsonl").write_text('{"text": "a"}\n' * 100 + "not json")
    documents = iter_documents(tmp_path / "bad.jsonl")
    fails("bad.jsonl:101", build_indexed_dataset, documents, tokenizer, dataset)
    assert {path.name: path.read_bytes() for path in Path(dataset).parent.iterdir()} == before


def test_a_replacement_that_stops_half_way_leaves_no_dataset(tmp_path, tokenizer, dataset):
    Path(dataset + ".json").unlink()
    Path(dataset + ".json").mkdir()
    # As large as before: the old index would fit the new tokens.
    fails("cannot write the dataset", build_indexed_dataset, TEXTS[::-1], tokenizer, dataset)
    fails("has no text.idx", read_index, dataset)


@pytest.mark.parametrize("tokens", [5000, 3_000_000], ids=["whole", "sampled"])
def test_content_digest(tmp_path, tokens):
    def write(name, data):
        builder = IndexedDatasetBuilder(str(tmp_path / name) + ".bin", dtype=numpy.uint16)
        builder.add_item(torch.from_numpy(data))
        builder.end_document()
        builder.finalize(str(tmp_path / name) + ".idx")
        return content_digest(str(tmp_path / name))

    data = numpy.arange(tokens) % 300
    first = write("first", data)
    assert write("again", data) == first
    # As long as the first: the index is the same.
    assert write("other", data[::-1].copy()) != first
    for changed in (0, tokens - 1):
        assert write("changed", numpy.where(numpy.arange(tokens) == changed, 7, data)) != first
    assert write("longer", numpy.append(data, 1)) != first


def test_unwritable(tmp_path, tokenizer):
    (tmp_path / "file").write_text("")
    fails("cannot write the dataset", build_indexed_dataset, TEXTS, tokenizer, tmp_path / "file" / "text")


@pytest.mark.parametrize("suffix", [".bin", ".idx"])
def test_missing_file(dataset, suffix):
    os.unlink(dataset + suffix)
    fails(f"has no text{suffix}", read_index, dataset)


@pytest.mark.parametrize("size", [0, 20, 34, 100, -1, -8])
def test_truncated_index(dataset, size):
    content = Path(dataset + ".idx").read_bytes()
    Path(dataset + ".idx").write_bytes(content[:size])
    fails(r"text\.idx (is truncated|has \d+ bytes)", read_index, dataset)


@pytest.mark.parametrize("change", [b"x", None], ids=["longer", "shorter"])
def test_data_of_another_size(dataset, change):
    content = Path(dataset + ".bin").read_bytes()
    Path(dataset + ".bin").write_bytes(content + change if change else content[:-2])
    fails(r"text\.bin has \d+ bytes where text\.idx promises", read_index, dataset)


@pytest.mark.parametrize(
    "offset, value, message",
    [
        (0, b"X", "is not an index"),
        (9, b"\x02", "is not an index"),
        (17, b"\x07", "type code 7"),
        (17, b"\x63", "type code 99"),
        (18, b"\xff" * 8, "its header promises"),
        (34, struct.pack("<i", -5), "contradict"),
        (34, struct.pack("<i", 2), "contradict"),
        (-8, struct.pack("<q", 3), "contradict"),
        (-8, struct.pack("<q", 1000), "contradict"),
        (34 + 12 * len(TEXTS), struct.pack("<q", 1), "contradict"),
        (-16, struct.pack("<q", 1), "contradict"),
    ],
)
def test_damaged_index(dataset, offset, value, message):
    content = bytearray(Path(dataset + ".idx").read_bytes())
    start = offset % len(content)
    content[start : start + len(value)] = value
    Path(dataset + ".idx").write_bytes(content)
    fails(message, read_index, dataset)


def test_too_few_tokens(tokenizer, dataset):
    tokens = read_index(dataset).tokens
    assert check_dataset(dataset, tokenizer, tokens - 1).tokens == tokens
    fails("too few for one sample of data.sequence_length", check_dataset, dataset, tokenizer, tokens)


def test_another_tokenizer(tmp_path, tokenizer, dataset):
    smaller = train_tokenizer(TEXTS, 300, tmp_path / "smaller")
    fails("was built with another tokenizer", check_dataset, dataset, smaller, 32)
    other = train_tokenizer(["something else entirely " * 50, *TEXTS], 320, tmp_path / "other")
    fails("was built with another tokenizer", check_dataset, dataset, other, 32)
    copied = train_tokenizer(TEXTS, 320, tmp_path / "copied")
    check_dataset(dataset, copied, 32)


def test_token_outside_the_vocabulary_without_counts(tmp_path, tokenizer):
    for name, token in (("large", 320), ("negative", -1)):
        builder = IndexedDatasetBuilder(str(tmp_path / name) + ".bin", dtype=numpy.int32)
        builder.add_item(torch.tensor([5] * 40 + [token]))
        builder.end_document()
        builder.finalize(str(tmp_path / name) + ".idx")
        fails(f"{name} holds token {token}, but", check_dataset, str(tmp_path / name), tokenizer, 32)


@pytest.mark.parametrize(
    "content", ["{", "[]", "{}", '{"documents": 1}', '{"documents": "x", "tokens": 1}', "counts of another", "no bytes"]
)
def test_damaged_counts(tmp_path, tokenizer, dataset, content):
    path = Path(dataset + ".json")
    if content == "counts of another":
        build_indexed_dataset(TEXTS[:3], tokenizer, tmp_path / "other")
        content = (tmp_path / "other.json").read_text()
    elif content == "no bytes":
        content = json.dumps(json.loads(path.read_text()) | {"bytes": 0})
    path.write_text(content)
    fails(r"text\.json does not describe", check_dataset, dataset, tokenizer, 32)
