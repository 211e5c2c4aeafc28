"""Which documents are held out."""

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from megatron_dmc.data import split_documents
from tests.support.texts import fails


@settings(max_examples=50, deadline=None)
@given(
    st.lists(st.text(min_size=1, max_size=20), min_size=2, max_size=30),
    st.floats(0.01, 0.9),
    st.integers(-(2**70), 2**70),
)
def test_properties(documents, fraction, seed):
    documents += ["first", "second"]
    train, valid = split_documents(iter(documents), fraction, seed)
    assert (train, valid) == split_documents(documents, fraction, seed)
    assert sorted(train + valid) == sorted(documents)
    assert train and valid and not set(train) & set(valid)
    if len(set(valid)) > 1:
        assert len("".join(valid).encode()) <= fraction * len("".join(documents).encode())


def test_amount_seed_and_order():
    documents = [f"document {i}" for i in range(1000)]
    _, valid = split_documents(documents, 0.1, 1)
    assert 95 <= len(valid) <= 100
    assert valid == sorted(valid, key=documents.index)
    assert set(valid) != set(split_documents(documents, 0.1, 2)[1])
    # Another file does not move a document to the other side.
    assert len(set(valid) & set(split_documents([*documents, "one more"], 0.1, 1)[1])) > 0.95 * len(valid)


@pytest.mark.parametrize(
    ("sizes", "fraction", "words"),
    [
        # nothing else fits
        (
            [10] * 3 + [1000] * 97,
            0.005,
            "warning: what is held out is not like the rest: 3 short document(s), 10 bytes in the mean; the 97 others have "
            "1000, and a fraction of 0.005 has no room for them. Hold out a larger one, or cut long documents into several",
        ),
        # not even the shortest fits
        (
            [300, 1000, 1000],
            0.1,
            "warning: what is held out is not like the rest: 1 short document(s), 300 bytes in the mean; the 2 others have",
        ),
        ([1000] * 100, 0.05, None),
        ([10, 1000] * 50, 0.1, None),
        # one that is cut
        ([1000], 0.1, None),
    ],
)
def test_held_out_documents_that_are_the_short_ones(caplog, sizes, fraction, words):
    documents = [f"{i:x}".ljust(size, "x") for i, size in enumerate(sizes)]
    with caplog.at_level("WARNING"):
        split_documents(documents, fraction)
    assert len(caplog.messages) == (words is not None)
    assert words is None or caplog.messages[0].startswith(words)


def test_zero_holds_nothing_out():
    assert split_documents(["a", "b"], 0.0) == (["a", "b"], [])
    assert split_documents([], 0.5) == ([], [])


def test_single_document_is_cut_at_a_line():
    text = "".join(f"line {i}\n" for i in range(100))
    [train], [valid] = split_documents([text], 0.1)
    assert train + valid == text and train.endswith("\n") and 0.05 < len(valid) / len(text) <= 0.1
    assert split_documents(["x" * 100], 0.1) == (["x" * 90], ["x" * 10])


@pytest.mark.parametrize("fraction", [-0.1, 1.0, float("nan")])
def test_bad_fraction(fraction):
    fails("must be in", split_documents, ["a", "b"], fraction)


def test_too_short_to_cut():
    fails("too few to hold out", split_documents, ["a"], 0.1)
