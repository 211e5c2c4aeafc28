"""Samples: their order, blends and caches, and which datasets are refused."""

import fcntl
import pickle
import random
import shutil
import time
from collections import Counter
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import numpy
import pytest
import torch
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from megatron_dmc.data import build_datasets, build_indexed_dataset, distinct_samples, global_batch
from megatron_dmc.data.indexed_dataset import read_index
from tests.support.processes import run
from tests.support.texts import TEXTS, data_config, fails, full_disk, stored_tokens

pytestmark = pytest.mark.usefixtures("one_process")


def test_samples_are_the_documents_packed(tmp_path, tokenizer, dataset):
    train, valid = build_datasets(data_config(tmp_path, tokenizer, dataset), tokenizer, 100, 5)
    assert len(train) >= 100 and valid is None
    stream = stored_tokens(dataset).tolist()
    joined = "".join(f"{token} " for token in stream)
    inside = 0
    for index in range(20):
        sample = train[index]
        assert sample["tokens"][1:].tolist() == sample["labels"][:-1].tolist()
        assert sample["position_ids"].tolist() == list(range(32)) and sample["loss_mask"].eq(1).all()
        # Documents are shuffled before they are packed: only a sample within one document is found as it is.
        if tokenizer.eod not in sample["tokens"][:-1]:
            inside += 1
            assert "".join(f"{token} " for token in sample["tokens"].tolist()) in joined
    assert inside >= 5


def test_order_depends_on_the_seed_alone(tmp_path, tokenizer, dataset):
    def tokens(folder, **keywords):
        config = data_config(tmp_path / folder, tokenizer, dataset, **keywords)
        return global_batch(build_datasets(config, tokenizer, 60, 0)[0], range(60))["tokens"]

    first = tokens("a")
    assert torch.equal(first, tokens("a")) and torch.equal(first, tokens("b"))
    assert not torch.equal(first, tokens("a", seed=7))


@pytest.mark.parametrize(
    "shares", [[1.0], [0.5, 0.5], [0.7, 0.3], [0.9, 0.06, 0.04], [0.27, 0.27, 0.46], [0.97, 0.03]], ids=str
)
@pytest.mark.parametrize("length", [16, 50, 90, 150])
def test_no_validation_sample_comes_twice(tmp_path, tokenizer, dataset, shares, length):
    words = [f"{random.Random(i).getrandbits(64):x}" for i in range(400)]
    begin, prefixes = 0, []
    for i, share in enumerate(shares):
        part = words[begin : begin + int(share * len(words))]
        begin += len(part)
        prefixes.append(str(tmp_path / f"valid{i}"))
        build_indexed_dataset([" ".join(part[j : j + 3]) for j in range(0, len(part), 3)], tokenizer, prefixes[-1])
    config = data_config(tmp_path, tokenizer, dataset, valid=prefixes, sequence_length=length)
    every = sum((len(stored_tokens(prefix)) - 1) // length for prefix in prefixes)
    count = distinct_samples(prefixes, length)
    assert count == every
    valid = build_datasets(config, tokenizer, 1, count)[1]
    assert len(valid) == count
    read = Counter(word for i in range(count) for word in tokenizer.detokenize(valid[i]["tokens"].tolist()).split(" "))
    assert max(read[word] for word in words) == 1


def test_how_many_samples_there_are_without_one(dataset):
    assert distinct_samples([], 16) == 0
    assert distinct_samples([dataset, dataset], 1_000_000) == 0


def test_validation_samples(tmp_path, tokenizer, dataset):
    build_indexed_dataset(TEXTS[:9], tokenizer, tmp_path / "valid")
    config = data_config(tmp_path, tokenizer, dataset, valid=[str(tmp_path / "valid")])
    train, valid = build_datasets(config, tokenizer, 10, 20)
    assert len(train) >= 10 and len(valid) >= 20
    assert build_datasets(config, tokenizer, 10, 0)[1] is None
    seen = set(torch.cat([valid[i]["tokens"] for i in range(20)]).tolist())
    assert seen <= {token for text in TEXTS[:9] for token in tokenizer.tokenize(text)} | {tokenizer.eod}


@settings(max_examples=40, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(st.integers(2, 200), st.integers(1, 300))
def test_every_size_gives_enough_samples(tmp_path, tokenizer, dataset, sequence_length, samples):
    config = data_config(tmp_path, tokenizer, dataset, dataset, sequence_length=sequence_length)
    train, _ = build_datasets(config, tokenizer, samples, 0)
    assert len(train) >= samples
    assert global_batch(train, [0, samples - 1])["tokens"].shape == (2, sequence_length)


def test_several_are_blended_by_their_tokens(tmp_path, tokenizer):
    build_indexed_dataset(["a" * 50] * 90, tokenizer, tmp_path / "large")
    build_indexed_dataset(["b" * 50] * 30, tokenizer, tmp_path / "small")
    config = data_config(tmp_path, tokenizer, str(tmp_path / "large"), str(tmp_path / "small"), sequence_length=8)
    train, _ = build_datasets(config, tokenizer, 400, 0)
    assert len(train) == 400
    b = set(tokenizer.tokenize("b" * 50))
    small = sum(not b.isdisjoint(train[i]["tokens"].tolist()) for i in range(400))
    assert 95 <= small <= 105
    # Every part of the run has the blend's proportions.
    assert 20 <= sum(not b.isdisjoint(train[i]["tokens"].tolist()) for i in range(100)) <= 30


def test_blend_may_need_more_of_one_than_its_share(tmp_path, tokenizer, dataset):
    # Each holds exactly one sample per epoch, and three cannot be divided evenly.
    sequence_length = read_index(dataset).tokens - 1
    config = data_config(tmp_path, tokenizer, dataset, dataset, sequence_length=sequence_length)
    assert len(build_datasets(config, tokenizer, 3, 0)[0]) == 3


def test_dataset_built_again_is_not_read_by_stale_indices(tmp_path, tokenizer, dataset):
    config = data_config(tmp_path, tokenizer, dataset)
    build_datasets(config, tokenizer, 30, 0)
    build_indexed_dataset(["short text " * 5] * 3, tokenizer, dataset)
    train, _ = build_datasets(config, tokenizer, 30, 0)
    expected = set(tokenizer.tokenize("short text " * 5)) | {tokenizer.eod}
    assert set(global_batch(train, range(30))["tokens"].flatten().tolist()) <= expected


@pytest.mark.parametrize("damage", ["truncated", "pickle", "object-array", "zip"])
def test_damaged_cache_is_built_again_and_never_unpickled(tmp_path, tokenizer, dataset, damage):
    config = data_config(tmp_path, tokenizer, dataset)
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


def test_unusable_cache(tmp_path, tokenizer, dataset):
    config = data_config(tmp_path, tokenizer, dataset)
    with full_disk(100):
        fails(
            "data.cache .* cannot be used: File too large; free some space", build_datasets, config, tokenizer, 100, 0
        )
    shutil.rmtree(config.cache)
    # What is larger than numpy's buffer fails without a reason.
    with full_disk(10_000):
        fails("cannot be used: No space left on device; free some space", build_datasets, config, tokenizer, 10_000, 0)
    shutil.rmtree(config.cache)
    Path(config.cache).write_text("a file")
    fails("data.cache .* cannot be used", build_datasets, config, tokenizer, 1, 0)


def test_one_run_at_a_time_builds_indices(tmp_path, tokenizer, dataset):
    config = data_config(tmp_path, tokenizer, dataset)
    build_datasets(config, tokenizer, 30, 0)
    [lock] = Path(config.cache).glob("*/lock")
    with lock.open() as file, ThreadPoolExecutor(1) as pool:
        fcntl.flock(file, fcntl.LOCK_EX)
        # Another number of samples has its own indices.
        built = pool.submit(build_datasets, config, tokenizer, 60, 0)
        time.sleep(0.5)
        waited = not built.done() and len(list(lock.parent.glob("*-shuffle_index.npy"))) == 1
        fcntl.flock(file, fcntl.LOCK_UN)
        assert len(built.result(timeout=60)[0]) >= 60
    assert waited


@pytest.mark.distributed
def test_two_ranks_read_what_one_process_reads(tmp_path, tokenizer, dataset):
    config = data_config(tmp_path / "alone", tokenizer, dataset, dataset)
    alone = global_batch(build_datasets(config, tokenizer, 50, 0)[0], range(50))["tokens"]
    done = run("-m", "tests.data.two_ranks_worker", dataset, tokenizer.folder, tmp_path)
    assert done.returncode == 0, done.stderr
    for rank in range(2):
        assert torch.equal(torch.load(tmp_path / f"rank{rank}.pt", weights_only=True), alone)


def test_shapes_types_and_indices(tmp_path, tokenizer, dataset):
    train, _ = build_datasets(data_config(tmp_path, tokenizer, dataset), tokenizer, 40, 0)
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
def test_outside(tmp_path, tokenizer, dataset, sample):
    train, _ = build_datasets(data_config(tmp_path, tokenizer, dataset), tokenizer, 40, 0)
    with pytest.raises(IndexError, match=f"sample {sample} is outside"):
        global_batch(train, [sample])


class _Evil:
    """Makes a file when it is unpickled."""

    def __init__(self, path):
        self.path = path

    def __reduce__(self):
        return open, (self.path, "w")


def test_an_index_that_fills_the_memory_is_refused(tmp_path, tokenizer, dataset):
    """Before it is built: a run of so many samples is legal, a text of so few tokens repeated for it is not."""
    index, samples, length = read_index(dataset), 2**28, 1024
    passes = -(-(samples * length + 1) // index.tokens)
    needed = (16 * samples + 20 * passes * index.documents) / 1e9
    assert needed > 100
    config = data_config(tmp_path, tokenizer, dataset, sequence_length=length)
    message = f"repeated {passes} times for {samples} samples, and its index would need {needed:.0f} GB"
    fails(message, build_datasets, config, tokenizer, samples, 0)
