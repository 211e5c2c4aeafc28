"""later_attention in blocks against its oracle, and what it means."""

import pytest
import torch
from torch import Tensor

from megatron_dmc.ops.later_attention import Tokens, later_attention
from megatron_dmc.ops.later_attention import torch as blocks
from tests.support.oracle import Draw, Shape

SHAPES = [Shape(1, 1, 1, 1, 8), Shape(2, 7, 4, 2, 8), Shape(1, 63, 6, 2, 16), Shape(3, 65, 3, 3, 4)]


def draw(shape: Shape, documents: Tensor | None = None, seed: int = 0) -> tuple[Tokens, Tokens]:
    """Queries and keys."""
    numbers, positions = Draw(seed), torch.arange(shape.seq)
    batch, seq, heads, kv_heads, head_dim = shape
    query, key = 3 * numbers.normal(batch, seq, heads, head_dim), numbers.normal(batch, seq, kv_heads, head_dim)
    return (
        Tokens(query, numbers.normal(batch, seq), positions, documents),
        Tokens(key, numbers.normal(batch, seq, heads), positions, documents),
    )


def documents_of(shape: Shape, seed: int = 0) -> Tensor:
    return (Draw(seed).uniform(shape.batch, shape.seq) < 0.1).long().cumsum(1)


@pytest.mark.parametrize("packed", [False, True], ids=["rows", "documents"])
@pytest.mark.parametrize("window", [0, 1, 5, 100])
@pytest.mark.parametrize("shape", SHAPES, ids=str)
def test_blocks_equal_the_oracle(shape: Shape, window: int, packed: bool, monkeypatch: pytest.MonkeyPatch) -> None:
    """Also with blocks of a few queries, and of one."""
    tokens = draw(shape, documents_of(shape) if packed else None)
    expected = later_attention(*tokens, local_window=window, backend="naive")
    for most in (2**24, 3 * shape.batch * shape.heads * shape.seq, 1):
        monkeypatch.setitem(blocks.MOST_SCORES, "cpu", most)
        torch.testing.assert_close(later_attention(*tokens, local_window=window), expected, rtol=1e-12, atol=1e-12)
    narrow = (x._replace(vectors=x.vectors.float(), log_weight=x.log_weight.float()) for x in tokens)
    got = later_attention(*narrow, local_window=window)
    assert got.dtype == torch.float32
    torch.testing.assert_close(got.double(), expected, rtol=1e-4, atol=1e-4)


def test_queries_in_parts_and_in_any_order_have_the_same_maximum() -> None:
    """As under context parallelism: every rank has some of the queries."""
    shape = Shape(2, 24, 4, 2, 8)
    queries, keys = draw(shape, documents_of(shape))
    whole = later_attention(queries, keys, local_window=3)
    parts = []
    for mine in (torch.tensor([*range(6), *range(18, 24)]), torch.arange(6, 18)):
        vectors, log_weight, documents = (x[:, mine] for x in (queries.vectors, queries.log_weight, queries.documents))
        parts.append(later_attention(Tokens(vectors, log_weight, mine, documents), keys, local_window=3))
    torch.testing.assert_close(torch.maximum(*parts), whole, rtol=1e-12, atol=1e-12)


def test_a_share_far_below_the_smallest_float_keeps_its_logarithm() -> None:
    key = torch.zeros(1, 3, 1, 2)
    key[0, 1, 0, 0] = 1
    query = torch.zeros(1, 3, 1, 2)
    query[0, 2, 0, 0] = 1000
    queries = Tokens(query, torch.zeros(1, 3), torch.arange(3))
    keys = Tokens(key, torch.zeros(1, 3, 1), torch.arange(3))
    scores = later_attention(queries, keys, local_window=2, softmax_scale=1.0)
    assert scores.flatten().tolist() == [-1000, -torch.inf, -torch.inf]


def test_shapes_that_do_not_fit_are_refused() -> None:
    queries, keys = draw(SHAPES[1])
    with pytest.raises(ValueError, match=r"keys \[b, s, kv_heads, d\] and \[b, s, heads\].+, \(2, 5, 4\)"):
        later_attention(queries, keys._replace(log_weight=keys.log_weight[:, :5]), local_window=1)
    with pytest.raises(ValueError, match="local_window must be >= 0"):
        later_attention(queries, keys, local_window=-1)
