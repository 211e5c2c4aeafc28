"""Samples that are a text twice: their tokens and masks, and which samples they are."""

import math
from fractions import Fraction
from typing import Any

import numpy
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from megatron_dmc.data import (
    HeldoutWindows,
    Repeats,
    SecondCopies,
    build_datasets,
    build_indexed_dataset,
    global_batch,
    heldout_windows,
)
from megatron_dmc.data.packing import packed_sample
from megatron_dmc.data.repeats import is_repeated, text_twice
from tests.support.texts import TEXTS, data_config


def naive(text: list[int], trained: list[bool], starts: list[bool] | None) -> tuple[dict[str, list[Any]], list[bool]]:
    """Token by token, from the s + 1 tokens that a sample is made of."""
    size = len(text) - 1
    half = math.ceil(size / 2)
    documents: list[list[int]] = []
    for i in range(half):
        if i == 0 or (starts is not None and starts[i]):
            documents.append([])
        documents[-1].append(i)
    names = ("tokens", "labels", "loss_mask", "position_ids", "document_starts")
    made: dict[str, list[Any]] = {name: [] for name in names}
    second: list[bool] = []
    for document in documents:
        for copy in (1, 2):
            for i in document:
                ends_copy = i == document[-1]
                made["tokens"].append(text[i])
                made["position_ids"].append(len(document) * (copy - 1) + i - document[0])
                made["document_starts"].append(copy == 1 and i == document[0])
                if copy == 1 and ends_copy:
                    made["labels"].append(text[document[0]])
                    made["loss_mask"].append(False)
                else:
                    made["labels"].append(text[i + 1])
                    made["loss_mask"].append(trained[i + 1] and not (starts is not None and starts[i + 1]))
                second.append(copy == 2 and not ends_copy)
    if starts is None:
        del made["document_starts"]
    return {name: values[:size] for name, values in made.items()}, second[:size]


@st.composite
def texts(draw: st.DrawFn) -> tuple[list[int], list[bool], list[bool] | None]:
    size = draw(st.integers(2, 24))
    # Every token once, so that no other can stand in its place.
    text = draw(st.permutations(range(100, 101 + size)))
    flags = st.lists(st.booleans(), min_size=size + 1, max_size=size + 1)
    return text, draw(flags), draw(st.none() | flags)


def sample_of(text: list[int], trained: list[bool], starts: list[bool] | None) -> dict[str, torch.Tensor]:
    return packed_sample(numpy.array(text), numpy.array(trained), None if starts is None else numpy.array(starts))


@given(texts())
def test_every_token_is_where_a_literal_construction_puts_it(
    made: tuple[list[int], list[bool], list[bool] | None],
) -> None:
    sample = sample_of(*made)
    twice, second = text_twice(sample)
    expected, expected_second = naive(*made)
    assert {name: tensor.tolist() for name, tensor in twice.items()} == expected
    assert second.tolist() == expected_second
    for name, tensor in sample.items():
        assert twice[name].dtype == tensor.dtype and twice[name].shape == tensor.shape
    # What a second copy's label is has been read before, in the same document.
    for i in second.nonzero().flatten().tolist():
        begin = i - int(twice["position_ids"][i])
        assert twice["labels"][i] in twice["tokens"][begin:i]


def test_a_sample_across_documents() -> None:
    twice, second = text_twice(sample_of([1, 2, 3, 4, 5, 6], [True] * 6, None))
    assert twice["tokens"].tolist() == [1, 2, 3, 1, 2]
    assert twice["labels"].tolist() == [2, 3, 1, 2, 3]
    assert twice["loss_mask"].tolist() == [1, 1, 0, 1, 1]
    assert twice["position_ids"].tolist() == [0, 1, 2, 3, 4]
    assert second.tolist() == [False, False, False, True, True]


def test_documents_that_stand_alone() -> None:
    starts = [False, False, True, True, False, False, False, False, False]
    twice, second = text_twice(sample_of([1, 2, 3, 4, 5, 6, 7, 8, 9], [True] * 9, starts))
    assert twice["tokens"].tolist() == [1, 2, 1, 2, 3, 3, 4, 4]
    assert twice["labels"].tolist() == [2, 1, 2, 3, 3, 4, 4, 5]
    assert twice["loss_mask"].tolist() == [1, 0, 1, 0, 0, 0, 0, 1]
    assert twice["position_ids"].tolist() == [0, 1, 2, 3, 0, 1, 0, 1]
    assert twice["document_starts"].tolist() == [True, False, False, False, True, False, True, False]
    assert second.tolist() == [False, False, True, *[False] * 5]


@pytest.mark.parametrize(("size", "tokens", "copied"), [(2, [1, 1], 0), (3, [1, 2, 1], 1)])
def test_the_shortest_samples(size: int, tokens: list[int], copied: int) -> None:
    twice, second = text_twice(sample_of([*range(1, size + 2)], [True] * (size + 1), None))
    assert twice["tokens"].tolist() == tokens and int(second.sum()) == copied


@given(
    st.integers(0, 2**28),
    st.integers(1, 400),
    st.sampled_from([0.0, 1.0, 1 / 3, 0.5, 0.3]) | st.floats(0, 1),
)
def test_repeats_are_spread_evenly(first: int, count: int, fraction: float) -> None:
    repeated = sum(is_repeated(i, fraction) for i in range(first, first + count))
    # A product of 2^28 and a float may be rounded over a whole number.
    assert abs(repeated - count * Fraction(fraction)) < 1 + 1e-6


def test_a_third_is_every_third() -> None:
    assert [i for i in range(3 * 2**20, 3 * 2**20 + 12) if is_repeated(i, 1 / 3)] == [
        3 * 2**20 + i for i in (2, 5, 8, 11)
    ]


def windows(count: int = 40, length: int = 9) -> HeldoutWindows:
    return HeldoutWindows(numpy.arange(count * length + 1), length, 1.0)


def test_the_fraction_may_change_in_the_run() -> None:
    data = windows()
    repeats = Repeats(data, lambda number: 0.5 if number < 20 else 0.25)
    assert len(repeats) == len(data)
    repeated = [not torch.equal(repeats[i]["tokens"], data[i]["tokens"]) for i in range(len(data))]
    assert (sum(repeated[:20]), sum(repeated[20:])) == (10, 5)
    for begin in range(17):
        assert sum(repeated[begin : begin + 4]) == 2
        assert sum(repeated[20 + begin : 24 + begin]) == 1
    for i, is_one in enumerate(repeated):
        expected = text_twice(data[i])[0] if is_one else data[i]
        found = repeats[i]
        assert bool(found.pop("repeated")) == is_one
        assert all(torch.equal(tensor, expected[name]) for name, tensor in found.items())


def test_second_copies_alone_count() -> None:
    trained = numpy.arange(361) % 2
    data = HeldoutWindows(numpy.arange(361), 9, 1.0, trained=trained)
    copies = SecondCopies(data)
    assert len(copies) == len(data)
    for i in range(len(data)):
        twice, second = text_twice(data[i])
        counts = copies[i]["loss_mask"] == 1
        assert torch.equal(counts, second & (twice["loss_mask"] == 1)) and counts.any()
        assert torch.equal(copies[i]["tokens"], twice["tokens"])


@pytest.mark.usefixtures("one_process")
@pytest.mark.parametrize("reset", [False, True], ids=["running-on", "reset"])
def test_a_blend(tmp_path, tokenizer, dataset, reset):
    build_indexed_dataset(TEXTS[:9], tokenizer, tmp_path / "second")
    config = data_config(
        tmp_path, tokenizer, dataset, str(tmp_path / "second"), sequence_length=19, reset_at_documents=reset
    )
    plain, _ = build_datasets(config, tokenizer, 60, 0)
    whole, repeated = (global_batch(data, range(60)) for data in (plain, Repeats(plain, lambda number: 1 / 3)))
    assert repeated.pop("repeated").tolist() == [i % 3 == 2 for i in range(60)]
    assert whole.keys() == repeated.keys()
    for i in range(60):
        expected = text_twice(plain[i])[0] if i % 3 == 2 else plain[i]
        assert all(torch.equal(repeated[name][i], expected[name]) for name in whole.keys() - {"sample_index"})
    # A resumed run, and any replica, reads a part of them.
    later = global_batch(Repeats(plain, lambda number: 1 / 3), range(17, 31))
    assert later.pop("repeated").tolist() == [i % 3 == 2 for i in range(17, 31)]
    assert all(torch.equal(tensor, repeated[name][17:31]) for name, tensor in later.items())


@pytest.mark.parametrize("length", [2, 3, 32, 33])
def test_heldout_documents(tokenizer, dataset, length):
    data = heldout_windows(dataset, length, tokenizer, reset_at_documents=True)
    batch = global_batch(SecondCopies(data), range(len(data)))
    assert batch["tokens"].shape == (len(data), length)
    assert batch["document_starts"][:, 0].all() and batch["position_ids"].max() < length
    assert batch["loss_mask"].any() == (length > 2)
