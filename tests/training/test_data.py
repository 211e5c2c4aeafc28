"""The data part: documents, tokenizers, indexed datasets, samples and held-out windows. Real files throughout."""

import importlib.util
import json
import logging
import os
import pickle
import resource
import struct
import subprocess
import sys
from pathlib import Path

import numpy
import pytest
import torch
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from megatron.core.datasets.indexed_dataset import IndexedDataset, IndexedDatasetBuilder

from megatron_dmc.config import ConfigError
from megatron_dmc.training.arguments import DataConfig
from megatron_dmc.training.data import (
    build_datasets,
    build_indexed_dataset,
    global_batch,
    heldout_windows,
    iter_documents,
    read_index,
    split_documents,
    standard_library_documents,
)
from megatron_dmc.training.tokenizer import check_vocabulary, load_tokenizer, train_tokenizer

ROOT = Path(__file__).parents[2]
TEXTS = [
    f"def function_{i}(x):\n    return x + {i * i}  # größer 日本 {'🙂' * (i % 3)}\n" * (i % 4 + 1) for i in range(40)
]


def _load_tool():
    specification = importlib.util.spec_from_file_location("preprocess_data", ROOT / "tools" / "preprocess_data.py")
    module = importlib.util.module_from_spec(specification)
    specification.loader.exec_module(module)
    return module


preprocess_data = _load_tool()


@pytest.fixture(scope="module")
def tokenizer(tmp_path_factory):
    return train_tokenizer(TEXTS, 320, tmp_path_factory.mktemp("tokenizer"))


@pytest.fixture
def dataset(tmp_path, tokenizer):
    """The prefix of an indexed dataset of TEXTS."""
    build_indexed_dataset(TEXTS, tokenizer, tmp_path / "data" / "text")
    return str(tmp_path / "data" / "text")


def _config(tmp_path, tokenizer, *train, valid=(), sequence_length=32, **keywords):
    return DataConfig(
        train=list(train),
        valid=list(valid),
        tokenizer=str(tokenizer.folder),
        sequence_length=sequence_length,
        cache=str(tmp_path / "cache"),
        **keywords,
    )


def _stream(prefix):
    """All tokens, int64, copied: the dataset unmaps its file when it is collected."""
    stored = IndexedDataset(prefix)
    return numpy.concatenate([stored[i] for i in range(len(stored))]).astype(numpy.int64)


def _fails(message, call, *arguments, **keywords):
    with pytest.raises(ConfigError, match=message) as caught:
        call(*arguments, **keywords)
    assert "\n" not in str(caught.value)


class TestTokenizer:
    def test_text_comes_back_unchanged(self, tokenizer):
        text = "any string: \x00\t\r\n  ü 日本 🙂 \u2028 " + "".join(map(chr, range(256)))
        ids = tokenizer.tokenize(text)
        assert tokenizer.detokenize(ids) == text
        assert max(ids) < tokenizer.vocab_size == 320
        assert tokenizer.tokenize_batch([text, "x"]) == [ids, tokenizer.tokenize("x")]

    def test_spelled_special_token_is_text(self, tokenizer):
        assert tokenizer.eod not in tokenizer.tokenize("a<|endoftext|>b")
        assert tokenizer.detokenize([tokenizer.eod]) == "<|endoftext|>"

    def test_transformers_reads_the_same_tokenizer(self, tokenizer):
        from transformers import AutoTokenizer

        theirs = AutoTokenizer.from_pretrained(tokenizer.folder)
        for text in TEXTS[:5]:
            assert theirs(text).input_ids == tokenizer.tokenize(text)
            assert theirs.decode(theirs(text).input_ids) == text
        assert theirs.eos_token_id == theirs.bos_token_id == tokenizer.eod
        assert len(theirs) == tokenizer.vocab_size

    def test_training_is_deterministic(self, tokenizer, tmp_path):
        again = train_tokenizer(TEXTS, 320, tmp_path)
        assert (tmp_path / "tokenizer.json").read_bytes() == (tokenizer.folder / "tokenizer.json").read_bytes()
        assert again.unique_identifiers == tokenizer.unique_identifiers
        assert sorted(os.listdir(tmp_path)) == ["tokenizer.json", "tokenizer_config.json"]

    @pytest.mark.parametrize("vocab_size", [256, 0, -1])
    def test_small_vocabulary_is_refused(self, tmp_path, vocab_size):
        _fails(f"vocabulary must be >= 257 .* got {vocab_size}", train_tokenizer, TEXTS, vocab_size, tmp_path)
        assert os.listdir(tmp_path) == []

    def test_no_text_is_refused(self, tmp_path):
        _fails("no text to train", train_tokenizer, [], 300, tmp_path)

    def test_unwritable_folder(self, tmp_path):
        (tmp_path / "file").write_text("")
        _fails("cannot write the tokenizer to", train_tokenizer, TEXTS, 300, tmp_path / "file" / "folder")

    def test_missing_folder_and_file(self, tmp_path):
        _fails("is not a folder", load_tokenizer, tmp_path / "missing")
        _fails("holds no tokenizer.json", load_tokenizer, tmp_path)

    @pytest.mark.parametrize("content", [b"{", b"", b"[]", b"\xff\xfe", b'{"model": {"type": "BPE"}}'])
    def test_damaged_tokenizer(self, tmp_path, content):
        (tmp_path / "tokenizer.json").write_bytes(content)
        _fails(r"tokenizer.json cannot be read as a tokenizer", load_tokenizer, tmp_path)

    @pytest.mark.parametrize(
        "name, eos_token",
        [
            ("tokenizer_config.json", "</s>"),
            ("tokenizer_config.json", {"content": "</s>", "lstrip": False}),
            ("special_tokens_map.json", "</s>"),
            (None, None),
        ],
        ids=["string", "added-token", "special-tokens-map", "well-known"],
    )
    def test_llama_style_end_token(self, tmp_path, name, eos_token):
        _llama_style(tmp_path)
        if name:
            (tmp_path / name).write_text(json.dumps({"eos_token": eos_token}))
        tokenizer = load_tokenizer(tmp_path)
        assert tokenizer.eod == 2
        assert tokenizer.vocab_size == 5
        assert tokenizer.tokenize("ab a") == [3, 4, 3]  # without <s>, which the file would add; not truncated to 2

    def test_no_end_token(self, tmp_path):
        _llama_style(tmp_path, end="<stop>")
        _fails("names no end-of-text token; set eos_token in", load_tokenizer, tmp_path)
        (tmp_path / "tokenizer_config.json").write_text(json.dumps({"eos_token": "<gone>"}))
        _fails("'<gone>' is not in the vocabulary", load_tokenizer, tmp_path)
        (tmp_path / "tokenizer_config.json").write_text("{")
        _fails("tokenizer_config.json is not JSON", load_tokenizer, tmp_path)

    def test_vocabulary_must_fit_the_model(self, tokenizer):
        check_vocabulary(tokenizer, 320)
        _fails("model.vocab_size is 319, but .* has 320 tokens", check_vocabulary, tokenizer, 319)


def _llama_style(folder, end="</s>"):
    """A sentencepiece-like tokenizer.json: it adds <s>, truncates, and has an unknown token."""
    from tokenizers import Tokenizer, models, pre_tokenizers, processors

    backend = Tokenizer(models.BPE({"<unk>": 0, "<s>": 1, end: 2, "a": 3, "b": 4}, [], unk_token="<unk>"))
    backend.pre_tokenizer = pre_tokenizers.Whitespace()
    backend.add_special_tokens(["<s>", end])
    backend.post_processor = processors.TemplateProcessing(single="<s> $A", special_tokens=[("<s>", 1)])
    backend.enable_truncation(2)
    backend.save(str(folder / "tokenizer.json"))


class TestDocuments:
    def test_folder_in_sorted_order(self, tmp_path):
        for name, text in {
            "b.md": "b",
            "a.txt": "a",
            "c/z.py": "z",
            "c/lines.jsonl": '{"text": "one"}\n\n{"text": ""}\n{"text": "two", "more": 1}',
            "d.rst": "d",
            "empty.txt": " \n",
            "data.json": '{"text": "no"}',
            "image.png": "no",
            ".hidden.txt": "no",
            ".git/a.txt": "no",
            "__pycache__/a.py": "no",
            "lib/site-packages/a.py": "no",
        }.items():
            (tmp_path / name).parent.mkdir(parents=True, exist_ok=True)
            (tmp_path / name).write_text(text)
        os.mkfifo(tmp_path / "pipe.txt")
        assert list(iter_documents(tmp_path)) == ["a", "b", "d", "one", "two", "z"]

    def test_folder_skips_what_is_no_text_with_one_warning(self, tmp_path, caplog):
        (tmp_path / "good.txt").write_text("good")
        (tmp_path / "latin.py").write_bytes("# -*- latin-1 -*- ü".encode("latin-1"))
        (tmp_path / "binary.txt").write_bytes(b"\x00\x01")
        (tmp_path / "late.jsonl").write_bytes(b'{"text": "first"}\n{"text": "\xff"}\n')
        with caplog.at_level(logging.WARNING):
            assert list(iter_documents(tmp_path)) == ["good"]
        [record] = caplog.records
        assert "skipped 3 file(s)" in record.message and "binary.txt" in record.message

    def test_single_files(self, tmp_path):
        (tmp_path / "a.txt").write_bytes(b"\xef\xbb\xbfone\r\ndocument")
        assert list(iter_documents(tmp_path / "a.txt")) == ["one\r\ndocument"]
        (tmp_path / "a.jsonl").write_bytes(b'\xef\xbb\xbf{"text": "1"}\r\n{"text": "2\\n"}')
        assert list(iter_documents(str(tmp_path / "a.jsonl"))) == ["1", "2\n"]

    @pytest.mark.parametrize(
        "name, content, message",
        [
            ("a.txt", b"fine\nfine\n\xfc\n", r"a\.txt:3 is not UTF-8"),
            ("a.txt", b"fine\n\x00", r"a\.txt:2 holds a NUL byte"),
            ("a.txt", b"", r"a\.txt holds no text"),
            ("a.txt", b" \n\n", r"a\.txt holds no text"),
            ("a.jsonl", b"", r"a\.jsonl holds no text"),
            ("a.jsonl", b'{"text": ""}\n', r"a\.jsonl holds no text"),
            ("a.jsonl", b'{"text": "a"}\n{"text": "\xfc"}\n', r"a\.jsonl:2 is not UTF-8"),
            ("a.jsonl", b'{"text": "a"}\n\n{"text": "b"\n', r"a\.jsonl:3 is not JSON"),
            ("a.jsonl", b"[" * 100_000, r"a\.jsonl:1 is not JSON"),
            ("a.jsonl", b'{"content": "a"}', r"a\.jsonl:1 is not an object with a string \"text\""),
            ("a.jsonl", b'{"text": 3}', r"a\.jsonl:1 is not an object with a string \"text\""),
            ("a.jsonl", b'["text"]', r"a\.jsonl:1 is not an object with a string \"text\""),
            ("a.jsonl", b'{"text": "\\ud800"}', r"a\.jsonl:1 holds half a surrogate"),
            ("a.csv", b"a,b", r"a\.csv is neither a folder nor a text file"),
        ],
    )
    def test_bad_file(self, tmp_path, name, content, message):
        (tmp_path / name).write_bytes(content)
        _fails(message, lambda: list(iter_documents(tmp_path / name)))

    def test_bad_json_line_in_a_folder_is_no_encoding_problem(self, tmp_path):
        (tmp_path / "a.jsonl").write_text('{"text": "a"}\nnot json\n')
        _fails(r"a\.jsonl:2 is not JSON", lambda: list(iter_documents(tmp_path)))

    def test_missing_empty_and_special(self, tmp_path):
        _fails("missing does not exist", lambda: list(iter_documents(tmp_path / "missing")))
        _fails("holds no text", lambda: list(iter_documents(tmp_path)))
        os.mkfifo(tmp_path / "pipe.txt")
        _fails("neither a folder nor", lambda: list(iter_documents(tmp_path / "pipe.txt")))

    def test_unreadable(self, tmp_path):
        # reads of this file fail for every user, root included
        (tmp_path / "a.txt").symlink_to("/proc/self/mem")
        _fails("a.txt cannot be read: Input/output error", lambda: list(iter_documents(tmp_path / "a.txt")))
        _fails("a.txt cannot be read: Input/output error", lambda: list(iter_documents(tmp_path)))

    def test_standard_library(self):
        documents = list(standard_library_documents())
        assert len(documents) > 300 and sum(map(len, documents)) > 5_000_000
        assert documents == list(standard_library_documents())
        everything = "".join(documents)
        assert "class JSONDecodeError" in everything  # json/decoder.py
        assert "class PydocDocTest" not in everything  # test/test_pydoc.py


class TestSplit:
    @settings(max_examples=50, deadline=None)
    @given(
        st.lists(st.text(min_size=1, max_size=20), min_size=2, max_size=30),
        st.floats(0.01, 0.9),
        st.integers(-(2**70), 2**70),
    )
    def test_properties(self, documents, fraction, seed):
        documents += ["first", "second"]
        train, valid = split_documents(iter(documents), fraction, seed)
        assert (train, valid) == split_documents(documents, fraction, seed)
        assert sorted(train + valid) == sorted(documents)
        assert train and valid and not set(train) & set(valid)
        if len(set(valid)) > 1:
            assert len("".join(valid).encode()) <= fraction * len("".join(documents).encode())

    def test_amount_seed_and_order(self):
        documents = [f"document {i}" for i in range(1000)]
        _, valid = split_documents(documents, 0.1, 1)
        assert 95 <= len(valid) <= 100
        assert valid == sorted(valid, key=documents.index)
        assert set(valid) != set(split_documents(documents, 0.1, 2)[1])
        # a document does not change sides because another file appears
        assert len(set(valid) & set(split_documents([*documents, "one more"], 0.1, 1)[1])) > 0.95 * len(valid)

    def test_zero_holds_nothing_out(self):
        assert split_documents(["a", "b"], 0.0) == (["a", "b"], [])

    def test_single_document_is_cut_at_a_line(self):
        text = "".join(f"line {i}\n" for i in range(100))
        [train], [valid] = split_documents([text], 0.1)
        assert train + valid == text and train.endswith("\n") and 0.05 < len(valid) / len(text) <= 0.1
        assert split_documents(["x" * 100], 0.1) == (["x" * 90], ["x" * 10])

    @pytest.mark.parametrize("fraction", [-0.1, 1.0, float("nan")])
    def test_bad_fraction(self, fraction):
        _fails("must be in", split_documents, ["a", "b"], fraction)

    def test_too_short_to_cut(self):
        _fails("too few to hold out", split_documents, ["a"], 0.1)


class TestIndexedDataset:
    def test_tokens_and_counts(self, tmp_path, tokenizer, dataset):
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
        assert counts["largest_token"] == max(int(ids.max()) for ids in stored)
        assert sorted(os.listdir(Path(dataset).parent)) == ["text.bin", "text.idx", "text.json"]

    def test_large_vocabulary_is_int32(self, tmp_path):
        from tokenizers import Tokenizer, models, pre_tokenizers

        backend = Tokenizer(models.WordLevel({f"w{i}": i for i in range(70_000)}, unk_token="w0"))
        backend.pre_tokenizer = pre_tokenizers.WhitespaceSplit()
        backend.add_special_tokens(["</s>"])
        backend.save(str(tmp_path / "tokenizer.json"))
        large = load_tokenizer(tmp_path)
        build_indexed_dataset(["w69999 w5"], large, tmp_path / "text")
        stored = IndexedDataset(str(tmp_path / "text"))
        assert stored.index.dtype is numpy.int32 and stored[0].tolist() == [69_999, 5, 70_000]

    def test_no_documents(self, tmp_path, tokenizer):
        _fails("there is no document to write", build_indexed_dataset, [], tokenizer, tmp_path / "text")
        assert os.listdir(tmp_path) == []

    def test_failing_documents_leave_what_was_there(self, tmp_path, tokenizer, dataset):
        before = {path.name: path.read_bytes() for path in Path(dataset).parent.iterdir()}
        (tmp_path / "bad.jsonl").write_text('{"text": "a"}\n' * 100 + "not json")
        documents = iter_documents(tmp_path / "bad.jsonl")
        _fails("bad.jsonl:101", build_indexed_dataset, documents, tokenizer, dataset)
        assert {path.name: path.read_bytes() for path in Path(dataset).parent.iterdir()} == before

    def test_unwritable(self, tmp_path, tokenizer):
        (tmp_path / "file").write_text("")
        _fails("cannot write the dataset", build_indexed_dataset, TEXTS, tokenizer, tmp_path / "file" / "text")

    @pytest.mark.parametrize("suffix", [".bin", ".idx"])
    def test_missing_file(self, dataset, suffix):
        os.unlink(dataset + suffix)
        _fails(f"has no text{suffix}", read_index, dataset)

    @pytest.mark.parametrize("size", [0, 20, 34, 100, -1, -8])
    def test_truncated_index(self, dataset, size):
        content = Path(dataset + ".idx").read_bytes()
        Path(dataset + ".idx").write_bytes(content[:size])
        _fails(r"text\.idx (is truncated|has \d+ bytes)", read_index, dataset)

    @pytest.mark.parametrize("change", [b"x", None], ids=["longer", "shorter"])
    def test_data_of_another_size(self, dataset, change):
        content = Path(dataset + ".bin").read_bytes()
        Path(dataset + ".bin").write_bytes(content + change if change else content[:-2])
        _fails(r"text\.bin has \d+ bytes where text\.idx promises", read_index, dataset)

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
    def test_damaged_index(self, dataset, offset, value, message):
        content = bytearray(Path(dataset + ".idx").read_bytes())
        start = offset % len(content)
        content[start : start + len(value)] = value
        Path(dataset + ".idx").write_bytes(content)
        _fails(message, read_index, dataset)


class TestDatasets:
    def test_samples_are_the_documents_packed(self, tmp_path, tokenizer, dataset):
        train, valid = build_datasets(_config(tmp_path, tokenizer, dataset), tokenizer, 100, 5)
        assert len(train) >= 100 and valid is None
        stream = _stream(dataset).tolist()
        joined = "".join(f"{token} " for token in stream)
        inside = 0
        for index in range(20):
            sample = train[index]
            assert sample["tokens"][1:].tolist() == sample["labels"][:-1].tolist()
            assert sample["position_ids"].tolist() == list(range(32)) and sample["loss_mask"].eq(1).all()
            # documents are shuffled before they are packed, so only samples within one document are found as they are
            if tokenizer.eod not in sample["tokens"][:-1]:
                inside += 1
                assert "".join(f"{token} " for token in sample["tokens"].tolist()) in joined
        assert inside >= 5

    def test_order_depends_on_the_seed_alone(self, tmp_path, tokenizer, dataset):
        def tokens(folder, **keywords):
            config = _config(tmp_path / folder, tokenizer, dataset, **keywords)
            return global_batch(build_datasets(config, tokenizer, 60, 0)[0], range(60))["tokens"]

        first = tokens("a")
        assert torch.equal(first, tokens("a")) and torch.equal(first, tokens("b"))
        assert not torch.equal(first, tokens("a", seed=7))

    def test_validation_samples(self, tmp_path, tokenizer, dataset):
        build_indexed_dataset(TEXTS[:9], tokenizer, tmp_path / "valid")
        config = _config(tmp_path, tokenizer, dataset, valid=[str(tmp_path / "valid")])
        train, valid = build_datasets(config, tokenizer, 10, 20)
        assert len(train) >= 10 and len(valid) >= 20
        assert build_datasets(config, tokenizer, 10, 0)[1] is None
        seen = set(torch.cat([valid[i]["tokens"] for i in range(20)]).tolist())
        assert seen <= {token for text in TEXTS[:9] for token in tokenizer.tokenize(text)} | {tokenizer.eod}

    @settings(max_examples=40, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
    @given(st.integers(2, 200), st.integers(1, 300))
    def test_every_size_gives_enough_samples(self, tmp_path, tokenizer, dataset, sequence_length, samples):
        config = _config(tmp_path, tokenizer, dataset, dataset, sequence_length=sequence_length)
        train, _ = build_datasets(config, tokenizer, samples, 0)
        assert len(train) >= samples
        assert global_batch(train, [0, samples - 1])["tokens"].shape == (2, sequence_length)

    def test_several_are_blended_by_their_tokens(self, tmp_path, tokenizer):
        build_indexed_dataset(["a" * 50] * 90, tokenizer, tmp_path / "large")
        build_indexed_dataset(["b" * 50] * 30, tokenizer, tmp_path / "small")
        config = _config(tmp_path, tokenizer, str(tmp_path / "large"), str(tmp_path / "small"), sequence_length=8)
        train, _ = build_datasets(config, tokenizer, 400, 0)
        assert len(train) == 400
        b = set(tokenizer.tokenize("b" * 50))
        small = sum(not b.isdisjoint(train[i]["tokens"].tolist()) for i in range(400))
        assert 95 <= small <= 105
        # every stretch of the run has the blend
        assert 20 <= sum(not b.isdisjoint(train[i]["tokens"].tolist()) for i in range(100)) <= 30

    def test_blend_may_need_more_of_one_than_its_share(self, tmp_path, tokenizer, dataset):
        # each holds exactly one sample per epoch, and three cannot be shared out evenly
        sequence_length = read_index(dataset).tokens - 1
        config = _config(tmp_path, tokenizer, dataset, dataset, sequence_length=sequence_length)
        assert len(build_datasets(config, tokenizer, 3, 0)[0]) == 3

    def test_dataset_built_again_is_not_read_by_stale_indices(self, tmp_path, tokenizer, dataset):
        config = _config(tmp_path, tokenizer, dataset)
        build_datasets(config, tokenizer, 30, 0)
        build_indexed_dataset(["short text " * 5] * 3, tokenizer, dataset)
        train, _ = build_datasets(config, tokenizer, 30, 0)
        expected = set(tokenizer.tokenize("short text " * 5)) | {tokenizer.eod}
        assert set(global_batch(train, range(30))["tokens"].flatten().tolist()) <= expected

    @pytest.mark.parametrize("damage", ["truncated", "pickle", "object-array", "zip"])
    def test_damaged_cache_is_built_again_and_never_unpickled(self, tmp_path, tokenizer, dataset, damage):
        config = _config(tmp_path, tokenizer, dataset)
        expected = global_batch(build_datasets(config, tokenizer, 30, 0)[0], range(30))["tokens"]
        [path] = Path(config.cache).glob("*/*-shuffle_index.npy")
        evil = _Evil(str(tmp_path / "unpickled"))
        if damage == "truncated":
            path.write_bytes(path.read_bytes()[:-9])
        elif damage == "pickle":
            path.write_bytes(pickle.dumps(evil))
        elif damage == "object-array":
            numpy.save(path, numpy.array([evil], dtype=object), allow_pickle=True)
        else:
            with path.open("wb") as file:
                numpy.savez(file, numpy.array([evil], dtype=object))
        again = global_batch(build_datasets(config, tokenizer, 30, 0)[0], range(30))["tokens"]
        assert torch.equal(again, expected)
        assert not (tmp_path / "unpickled").exists()

    def test_unusable_cache(self, tmp_path, tokenizer, dataset):
        (tmp_path / "cache").write_text("a file")
        _fails("data.cache .* cannot be used", build_datasets, _config(tmp_path, tokenizer, dataset), tokenizer, 1, 0)

    def test_too_few_tokens(self, tmp_path, tokenizer, dataset):
        tokens = read_index(dataset).tokens
        build_datasets(_config(tmp_path, tokenizer, dataset, sequence_length=tokens - 1), tokenizer, 1, 0)
        config = _config(tmp_path, tokenizer, dataset, sequence_length=tokens)
        _fails("too few for one sample of data.sequence_length", build_datasets, config, tokenizer, 1, 0)

    def test_another_tokenizer(self, tmp_path, tokenizer, dataset):
        config = _config(tmp_path, tokenizer, dataset)
        smaller = train_tokenizer(TEXTS, 300, tmp_path / "smaller")
        _fails("has ids 0 to 299; build the dataset with this", build_datasets, config, smaller, 1, 0)
        other = train_tokenizer(["something else entirely " * 50, *TEXTS], 320, tmp_path / "other")
        _fails("was built with another tokenizer", build_datasets, config, other, 1, 0)
        copied = train_tokenizer(TEXTS, 320, tmp_path / "copied")
        build_datasets(config, copied, 1, 0)

    def test_token_outside_the_vocabulary_without_counts(self, tmp_path, tokenizer):
        for name, token in (("large", 320), ("negative", -1)):
            builder = IndexedDatasetBuilder(str(tmp_path / name) + ".bin", dtype=numpy.int32)
            builder.add_item(torch.tensor([5] * 40 + [token]))
            builder.end_document()
            builder.finalize(str(tmp_path / name) + ".idx")
            config = _config(tmp_path, tokenizer, str(tmp_path / name))
            _fails(f"{name} holds token {token}, but", build_datasets, config, tokenizer, 1, 0)

    @pytest.mark.parametrize(
        "content", ["{", "[]", "{}", '{"documents": 1}', '{"documents": "x", "tokens": 1}', "counts of another"]
    )
    def test_damaged_counts(self, tmp_path, tokenizer, dataset, content):
        if content == "counts of another":
            build_indexed_dataset(TEXTS[:3], tokenizer, tmp_path / "other")
            content = (tmp_path / "other.json").read_text()
        Path(dataset + ".json").write_text(content)
        config = _config(tmp_path, tokenizer, dataset)
        _fails(r"text\.json does not describe", build_datasets, config, tokenizer, 1, 0)

    def test_bad_numbers(self, tmp_path, tokenizer, dataset):
        _fails("data.train is empty", build_datasets, _config(tmp_path, tokenizer), tokenizer, 1, 0)
        _fails(">= 1 training samples", build_datasets, _config(tmp_path, tokenizer, dataset), tokenizer, 0, 0)
        config = _config(tmp_path, tokenizer, dataset, seed=2**32)
        _fails(r"data.seed must be in", build_datasets, config, tokenizer, 1, 0)

    @pytest.mark.distributed
    def test_two_ranks_read_what_one_process_reads(self, tmp_path, tokenizer, dataset):
        config = _config(tmp_path / "alone", tokenizer, dataset, dataset)
        alone = global_batch(build_datasets(config, tokenizer, 50, 0)[0], range(50))["tokens"]
        program = f"""
import sys, torch
from megatron_dmc.training.arguments import DataConfig
from megatron_dmc.training.data import build_datasets, global_batch
from megatron_dmc.training.tokenizer import load_tokenizer
rank = int(sys.argv[1])
torch.distributed.init_process_group("gloo", init_method="file://{tmp_path}/rendezvous", rank=rank, world_size=2)
config = DataConfig(train=[{dataset!r}] * 2, tokenizer={str(tokenizer.folder)!r}, sequence_length=32,
                    cache={str(tmp_path / "together")!r})
train, _ = build_datasets(config, load_tokenizer(config.tokenizer), 50, 0)
torch.save(global_batch(train, range(50))["tokens"], f"{tmp_path}/rank{{rank}}.pt")
torch.distributed.barrier()
torch.distributed.destroy_process_group()
"""
        environment = {**os.environ, "PYTHONPATH": str(ROOT), "OMP_NUM_THREADS": "1"}
        ranks = [
            subprocess.Popen([sys.executable, "-c", program, str(rank)], env=environment, stderr=subprocess.PIPE)
            for rank in range(2)
        ]
        for process in ranks:
            _, error = process.communicate(timeout=120)
            assert process.returncode == 0, error.decode()
        for rank in range(2):
            assert torch.equal(torch.load(tmp_path / f"rank{rank}.pt", weights_only=True), alone)


class _Evil:
    """Leaves a file behind when it is unpickled."""

    def __init__(self, path):
        self.path = path

    def __reduce__(self):
        return open, (self.path, "w")


class TestBatches:
    def test_shapes_types_and_indices(self, tmp_path, tokenizer, dataset):
        train, _ = build_datasets(_config(tmp_path, tokenizer, dataset), tokenizer, 40, 0)
        batch = global_batch(train, [7, 3, 39])
        assert {name: (tuple(value.shape), value.dtype) for name, value in batch.items()} == {
            "tokens": ((3, 32), torch.int64),
            "labels": ((3, 32), torch.int64),
            "loss_mask": ((3, 32), torch.float32),
            "position_ids": ((3, 32), torch.int64),
            "sample_index": ((3,), torch.int64),
        }
        assert batch["sample_index"].tolist() == [7, 3, 39]
        assert torch.equal(batch["tokens"][1], train[3]["tokens"])

    @pytest.mark.parametrize("sample", [-1, 10_000])
    def test_outside(self, tmp_path, tokenizer, dataset, sample):
        train, _ = build_datasets(_config(tmp_path, tokenizer, dataset), tokenizer, 40, 0)
        with pytest.raises(IndexError, match=f"sample {sample} is outside"):
            global_batch(train, [sample])


class TestHeldoutWindows:
    @pytest.mark.parametrize("sequence_length", [2, 33, 64])
    def test_windows_cover_the_stream(self, tokenizer, dataset, sequence_length):
        windows = heldout_windows(dataset, sequence_length, tokenizer)
        stream = torch.from_numpy(_stream(dataset))
        count = (len(stream) - 1) // sequence_length
        assert len(windows) == count
        batch = global_batch(windows, range(count))
        assert torch.equal(batch["tokens"].flatten(), stream[: count * sequence_length])
        assert torch.equal(batch["labels"].flatten(), stream[1 : count * sequence_length + 1])
        assert batch["loss_mask"].dtype == torch.float32 and batch["loss_mask"].eq(1).all()
        with pytest.raises(IndexError):
            windows[count]

    def test_bytes_per_token_with_and_without_counts(self, tokenizer, dataset):
        expected = len("".join(TEXTS).encode()) / read_index(dataset).tokens
        assert heldout_windows(dataset, 16, tokenizer).bytes_per_token == pytest.approx(expected, rel=1e-12)
        os.unlink(dataset + ".json")
        assert heldout_windows(dataset, 16, tokenizer).bytes_per_token == pytest.approx(expected, rel=1e-12)

    def test_too_short(self, tokenizer, dataset):
        _fails("too few for one sample", heldout_windows, dataset, 100_000, tokenizer)


class TestPreprocessData:
    @pytest.fixture
    def text(self, tmp_path):
        path = tmp_path / "text.jsonl"
        path.write_text("".join(json.dumps({"text": text}) + "\n" for text in TEXTS))
        return str(path)

    def test_trains_a_tokenizer_and_splits(self, tmp_path, text, capsys):
        prefix = str(tmp_path / "out" / "data")
        arguments = ["--input", text, "--input", text, "--train-tokenizer", "300", "--output", prefix]
        assert preprocess_data.main([*arguments, "--valid-fraction", "0.2"]) == 0
        tokenizer = load_tokenizer(f"{prefix}_tokenizer")
        assert tokenizer.vocab_size == 300
        train, valid = read_index(f"{prefix}_train"), read_index(f"{prefix}_valid")
        assert train.documents + valid.documents == 2 * len(TEXTS) and valid.documents >= 2
        assert f"data_train: {train.documents} documents, {train.tokens} tokens" in capsys.readouterr().out

    def test_refuses_to_overwrite(self, tmp_path, text, tokenizer, capsys):
        prefix = str(tmp_path / "data")
        arguments = ["--input", text, "--tokenizer", str(tokenizer.folder), "--output", prefix]
        assert preprocess_data.main(arguments) == 0
        first = Path(prefix + ".bin").read_bytes()
        Path(text).write_text('{"text": "other"}')
        assert preprocess_data.main(arguments) == 1
        assert "data.bin exists; choose another --output or add --overwrite" in capsys.readouterr().err
        assert Path(prefix + ".bin").read_bytes() == first
        assert preprocess_data.main([*arguments, "--overwrite"]) == 0
        assert read_index(prefix).documents == 1

    @pytest.mark.parametrize(
        "changed, message",
        [
            ({"--input": "missing.txt"}, "missing.txt does not exist"),
            ({"--tokenizer": "missing"}, "missing is not a folder"),
            ({"--valid-fraction": "1.5"}, "must be in [0, 1)"),
        ],
    )
    def test_bad_input_is_one_line(self, tmp_path, text, tokenizer, capsys, changed, message):
        options = {"--input": text, "--tokenizer": str(tokenizer.folder), "--output": str(tmp_path / "data")} | changed
        before = sorted(os.listdir(tmp_path))
        assert preprocess_data.main([word for pair in options.items() for word in pair]) == 1
        error = capsys.readouterr().err
        assert message in error and error.count("\n") == 1
        assert sorted(os.listdir(tmp_path)) == before

    def test_full_disk(self, tmp_path, text, tokenizer):
        """As a command of its own, with files limited to 4 KiB: one line, exit status 1, and nothing left behind."""
        before = sorted(os.listdir(tmp_path))
        large = tmp_path / "large.txt"
        large.write_text("no two lines alike " * 5000)
        tool = [sys.executable, str(ROOT / "tools" / "preprocess_data.py")]
        run = subprocess.run(
            [*tool, "--input", large, "--tokenizer", tokenizer.folder, "--output", tmp_path / "data"],
            env={**os.environ, "PYTHONPATH": str(ROOT), "OMP_NUM_THREADS": "1", "PYTHONDONTWRITEBYTECODE": "1"},
            capture_output=True,
            text=True,
            timeout=120,
            preexec_fn=lambda: resource.setrlimit(resource.RLIMIT_FSIZE, (4096, 4096)),
        )
        assert run.returncode == 1
        assert run.stderr.startswith("preprocess_data: cannot write the dataset") and run.stderr.count("\n") == 1
        assert sorted(os.listdir(tmp_path)) == sorted([*before, "large.txt"])
