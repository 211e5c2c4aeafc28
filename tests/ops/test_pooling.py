"""Pooling against its token-by-token oracle: outputs, all gradients, running state, and defining properties."""

from collections.abc import Sequence
from functools import partial
from typing import Any

import pytest
import torch
import torch.distributed as dist
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from megatron_dmc.ops.pooling import PoolState, pool
from megatron_dmc.ops.pooling.context_parallel import context_parallel_pool
from tests.support.oracle import Draw, Shape, assert_equals_oracle, draw_pooling

NAMES = ("key", "value", "alpha", "omega")


def tokens(
    seq: int, *, batch: int = 2, kv_heads: int = 2, head_dim: int = 8, **options: Any
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """key, value, alpha, omega; options are draw_pooling's."""
    return tuple(draw_pooling(Shape(batch, seq, kv_heads, kv_heads, head_dim), **options).values())  # type: ignore[return-value]


def assert_equal_to_oracle(inputs: Sequence[Tensor], tolerance: float, **options: Any) -> None:
    fast, oracle = partial(pool, **options), partial(pool, backend="naive", **options)
    # Where every token stands alone, omega's gradient is zero but for rounding.
    assert_equals_oracle(fast, oracle, dict(zip(NAMES, inputs, strict=True)), tolerance, floor=1.0)


@pytest.mark.parametrize("window_size", [None, 1, 5, 12], ids=lambda w: f"W{w}")
@pytest.mark.parametrize("shape", [Shape(2, seq, 2, 2, 8) for seq in (1, 2, 31, 32, 33, 63, 65, 97)], ids=str)
def test_equals_the_oracle(shape: Shape, window_size: int | None) -> None:
    assert_equal_to_oracle(list(draw_pooling(shape).values()), 1e-12, window_size=window_size)


@pytest.mark.parametrize("shape", [Shape(2, seq, 2, 2, 8) for seq in (1, 33, 65)], ids=str)
def test_a_state_that_is_carried_equals_the_oracle(shape: Shape) -> None:
    """From the state before the first token to the one after the last, with gradients through both."""
    state = Draw(5)
    inputs = draw_pooling(shape)
    for name in ("key_sum", "value_sum"):
        inputs[name] = state.normal(shape.batch, shape.kv_heads, shape.head_dim)
    inputs["weight"] = state.uniform(shape.batch, shape.kv_heads) + 0.1

    def carried(*x: Tensor, backend: str) -> tuple[Tensor, ...]:
        pooled_key, pooled_value, last = pool(
            *x[:4], initial_state=PoolState(*x[4:]), return_final_state=True, backend=backend
        )
        return pooled_key, pooled_value, *last

    assert_equals_oracle(partial(carried, backend="auto"), partial(carried, backend="naive"), inputs, 1e-12)


@pytest.mark.parametrize("decisions", ["soft", "hard", "mixed", "none", "all"])
@pytest.mark.parametrize("shape", [Shape(1, 64, 1, 1, 4), Shape(1, 1025, 1, 1, 4)], ids=str)
def test_equals_the_oracle_for_every_kind_of_decision(shape: Shape, decisions: str) -> None:
    """1025 = 32 * 32 + 1: the scan over chunks is itself chunked, and a tail is left over."""
    # The oracle with its double loop is quadratic. On long inputs the plain recurrence, under autograd, takes its place.
    oracle = recurrence if shape.seq > 64 else partial(pool, backend="naive")
    assert_equals_oracle(pool, oracle, draw_pooling(shape, decisions=decisions), 1e-12, floor=1.0)


def recurrence(key: Tensor, value: Tensor, alpha: Tensor, omega: Tensor) -> tuple[Tensor, Tensor]:
    entries = torch.cat([key, value, torch.ones_like(key[..., :1])], dim=-1) * omega[..., None]
    sums = [entries[:, 0]]
    for t in range(1, key.shape[1]):
        sums.append(alpha[:, t, :, None] * sums[-1] + entries[:, t])
    stacked = torch.stack(sums, dim=1)
    pooled_key, pooled_value = (stacked[..., :-1] / stacked[..., -1:]).chunk(2, dim=-1)
    return pooled_key, pooled_value


@pytest.mark.parametrize("window_size", [None, 12], ids=lambda w: f"W{w}")
@pytest.mark.parametrize(
    ("dtype", "tolerance"), [(torch.float32, 3e-6), (torch.bfloat16, 2e-2)], ids=["float32", "bfloat16"]
)
@pytest.mark.parametrize("shape", [Shape(2, seq, 2, 2, 8) for seq in (33, 65)], ids=str)
def test_lower_precision_stays_near_the_oracle(
    shape: Shape, dtype: torch.dtype, tolerance: float, window_size: int | None
) -> None:
    inputs = list(draw_pooling(shape, dtype=dtype).values())
    assert_equal_to_oracle(inputs, tolerance, window_size=window_size)


def test_bfloat16_keeps_float32_sums() -> None:
    """4095 equal tokens merged in bf16 sums would stop growing at a weight of 256; the mean must stay the mean."""
    ones = torch.ones(1, 4096, 1, dtype=torch.float32)
    key = torch.linspace(-1, 1, 4096).reshape(1, -1, 1, 1).expand(-1, -1, -1, 2).bfloat16()
    pooled, _ = pool(key, key, ones, ones)
    assert abs(pooled[0, -1, 0, 0].float()) < 1e-3
    assert pooled.dtype == torch.bfloat16


@pytest.mark.parametrize("backward_too", [False, True], ids=["forward", "both-passes"])
@pytest.mark.parametrize("cut", [False, True], ids=["whole", "context-parallel"])
def test_autocast_changes_nothing(cut: bool, backward_too: bool, one_process: None) -> None:
    def gradients(autocast: bool) -> tuple[Tensor, ...]:
        leaves = [x.requires_grad_() for x in tokens(98, dtype=torch.float32)]
        merge = partial(context_parallel_pool, group=dist.group.WORLD) if cut else pool
        with torch.autocast("cpu", torch.bfloat16, enabled=autocast):
            outputs = merge(*leaves)
            total = sum(x.square().sum() for x in outputs)
            if backward_too:
                return *outputs, *torch.autograd.grad(total, leaves)
        return *outputs, *torch.autograd.grad(total, leaves)

    assert all(torch.equal(x, y) for x, y in zip(gradients(True), gradients(False), strict=True))


@pytest.mark.parametrize("window_size", [None, 5], ids=lambda w: f"W{w}")
def test_document_starts_open_a_slot(window_size: int | None) -> None:
    inputs = tokens(65, decisions="all")
    starts = torch.zeros(2, 65, dtype=torch.bool)
    starts[0, [1, 31, 32, 33]] = True
    starts[1, 64] = True
    assert_equal_to_oracle(inputs, 1e-12, window_size=window_size, document_starts=starts)
    whole, _ = pool(*inputs, window_size=window_size, document_starts=starts)
    alone, _ = pool(*(x[:1, 33:] for x in inputs), window_size=window_size)
    torch.testing.assert_close(whole[:1, 33:], alone, rtol=1e-13, atol=1e-13)


def test_the_first_alpha_counts_as_zero() -> None:
    key, value, alpha, omega = tokens(7)
    alpha = alpha.clone().requires_grad_()
    with_alpha, _ = pool(key, value, alpha, omega)
    with_alpha.sum().backward()
    changed = alpha.detach().clone()
    changed[:, 0] = 1 - changed[:, 0]
    assert torch.equal(with_alpha, pool(key, value, changed, omega)[0])
    assert torch.equal(alpha.grad[:, 0], torch.zeros_like(alpha.grad[:, 0]))  # type: ignore[index]


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32, torch.bfloat16], ids=str)
@pytest.mark.parametrize("seq", [5, 97, 1025])
def test_alpha_zero_returns_the_tokens_to_the_last_bit(seq: int, dtype: torch.dtype) -> None:
    key, value, alpha, omega = tokens(seq, decisions="none", dtype=dtype)
    pooled_key, pooled_value = pool(key, value, alpha, omega)
    assert torch.equal(pooled_key, key) and torch.equal(pooled_value, value)
    # Where a slot starts the token stands alone, whatever was merged before it.
    mixed = tokens(seq, decisions="hard", dtype=dtype)
    pooled_key, _ = pool(*mixed)
    alone = mixed[2] == 0
    assert torch.equal(pooled_key[alone], mixed[0][alone])


@pytest.mark.parametrize("splits", [[1], [32], [40, 41], [31, 33, 90]], ids=str)
@pytest.mark.parametrize("decisions", ["mixed", "all"])
def test_state_carried_over_a_split_equals_the_whole(splits: list[int], decisions: str) -> None:
    def in_parts(*x: Tensor) -> list[Tensor]:
        parts: list[tuple[Tensor, Tensor]] = []
        state: PoolState | None = None
        for begin, end in zip([0, *splits], [*splits, 97], strict=True):
            chunk = (each[:, begin:end] for each in x)
            pooled_key, pooled_value, state = pool(*chunk, initial_state=state, return_final_state=True)
            parts.append((pooled_key, pooled_value))
        return [torch.cat(each, dim=1) for each in zip(*parts, strict=True)]

    assert_equals_oracle(in_parts, pool, draw_pooling(Shape(2, 97, 2, 2, 8), decisions=decisions), 1e-12)


def test_state_is_what_the_definition_says() -> None:
    key, value, alpha, omega = tokens(5, decisions="soft")
    _, _, state = pool(key, value, alpha, omega, return_final_state=True)
    decay = torch.ones_like(alpha)
    for t in range(3, -1, -1):
        decay[:, t] = decay[:, t + 1] * alpha[:, t + 1]
    for got, x in zip(state, (key, value, torch.ones_like(omega)[..., None]), strict=True):
        expected = (decay[..., None] * omega[..., None] * x).sum(1)
        torch.testing.assert_close(got, expected.squeeze(-1) if got.dim() == 2 else expected, rtol=1e-13, atol=1e-13)
    assert state.key_sum.shape == state.value_sum.shape == (2, 2, 8) and state.weight.shape == (2, 2)
    half = pool(*tokens(5, dtype=torch.bfloat16), return_final_state=True)[2]
    assert {x.dtype for x in half} == {torch.float32}


def test_an_empty_state_and_a_first_merge_is_a_start() -> None:
    """A fresh cache slot holds zeros: merging into it must give the token, not 0 / 0."""
    inputs = tokens(3, decisions="all")
    empty = PoolState(torch.zeros(2, 2, 8).double(), torch.zeros(2, 2, 8).double(), torch.zeros(2, 2).double())
    pooled, _ = pool(*inputs, initial_state=empty)
    torch.testing.assert_close(pooled, pool(*inputs)[0], rtol=1e-13, atol=1e-13)


@pytest.mark.parametrize("window_size", [None, 3], ids=["exact", "W3"])
def test_gradcheck(window_size: int | None) -> None:
    key, value, _, omega = tokens(9, batch=1, head_dim=2)
    alpha = torch.linspace(0.05, 0.95, 18, dtype=torch.float64).reshape(1, 9, 2)
    leaves = [x.clone().requires_grad_() for x in (key, value, alpha, omega)]
    assert torch.autograd.gradcheck(lambda *x: pool(*x, window_size=window_size), leaves)


def test_gradcheck_through_the_state() -> None:
    key, value, _, omega = tokens(34, batch=1, kv_heads=1, head_dim=2)
    alpha = torch.linspace(0.05, 0.95, 34, dtype=torch.float64).reshape(1, 34, 1)
    state = [torch.randn(1, 1, 2).double(), torch.randn(1, 1, 2).double(), torch.full((1, 1), 0.7).double()]
    leaves = [x.clone().requires_grad_() for x in (key, value, alpha, omega, *state)]

    def run(*x: Tensor) -> tuple[Tensor, ...]:
        pooled_key, pooled_value, last = pool(*x[:4], initial_state=PoolState(*x[4:]), return_final_state=True)
        return pooled_key, pooled_value, *last

    assert torch.autograd.gradcheck(run, leaves)


def test_strides_do_not_matter() -> None:
    inputs = tokens(40)
    strided = [x.transpose(0, 1).contiguous().transpose(0, 1) for x in inputs]
    assert torch.equal(pool(*inputs)[0], pool(*strided)[0])


@settings(max_examples=25, deadline=None)
@given(seq=st.integers(1, 80), seed=st.integers(0, 10**6))
def test_merging_everything_gives_the_weighted_mean(seq: int, seed: int) -> None:
    key, value, alpha, omega = tokens(seq, decisions="all", seed=seed)
    pooled_key, pooled_value = pool(key, value, alpha, omega)
    for pooled, x in ((pooled_key, key), (pooled_value, value)):
        mean = (omega[..., None] * x).cumsum(1) / omega.cumsum(1)[..., None]
        torch.testing.assert_close(pooled, mean, rtol=1e-12, atol=1e-12)


@settings(max_examples=25, deadline=None)
@given(seq=st.integers(1, 80), seed=st.integers(0, 10**6), window_size=st.sampled_from([None, 1, 3, 12]))
def test_a_slot_is_a_convex_combination_of_its_tokens(seq: int, seed: int, window_size: int | None) -> None:
    key, value, alpha, omega = tokens(seq, decisions="hard", seed=seed)
    pooled, _ = pool(key, value, alpha, omega, window_size=window_size)
    for t in range(seq):
        for b in range(2):
            for head in range(2):
                first = t
                while first > 0 and alpha[b, first, head] == 1 and (window_size is None or t - first + 1 < window_size):
                    first -= 1
                slot = key[b, first : t + 1, head]
                assert (pooled[b, t, head] <= slot.max(0).values + 1e-12).all()
                assert (pooled[b, t, head] >= slot.min(0).values - 1e-12).all()


@settings(max_examples=25, deadline=None)
@given(
    seq=st.integers(2, 100),
    cut=st.floats(0, 1),
    seed=st.integers(0, 10**6),
    decisions=st.sampled_from(["soft", "hard"]),
)
def test_any_split_with_carried_state_equals_the_whole(seq: int, cut: float, seed: int, decisions: str) -> None:
    inputs = tokens(seq, decisions=decisions, seed=seed)
    at = 1 + int(cut * (seq - 2))
    whole = pool(*inputs, return_final_state=True)
    head = pool(*(x[:, :at] for x in inputs), return_final_state=True)
    tail = pool(*(x[:, at:] for x in inputs), initial_state=head[2], return_final_state=True)
    for i in range(2):
        joined = torch.cat([head[i], tail[i]], dim=1)  # type: ignore[list-item]
        torch.testing.assert_close(joined, whole[i], rtol=1e-12, atol=1e-12)
    for got, expected in zip(tail[2], whole[2], strict=True):
        torch.testing.assert_close(got, expected, rtol=1e-12, atol=1e-12)


STATE = PoolState(torch.zeros(2, 2, 8), torch.zeros(2, 2, 8), torch.zeros(2, 2))


@pytest.mark.parametrize(
    ("change", "options", "message"),
    [
        ({"value": lambda x: x[..., :4]}, {}, "value"),
        ({"alpha": lambda x: x[:, :-1]}, {}, "alpha"),
        ({"omega": lambda x: x[..., None]}, {}, "omega"),
        ({}, {"window_size": 0}, "window_size must be >= 1.*got 0"),
        ({}, {"window_size": 3, "initial_state": STATE}, "window_size"),
        ({}, {"window_size": 3, "return_final_state": True}, "window_size"),
        ({}, {"backend": "cuda"}, "backend must be auto, torch or naive, got 'cuda'"),
    ],
    ids=[
        "value-shape",
        "alpha-shape",
        "omega-shape",
        "window-0",
        "window-state",
        "window-final",
        "backend",
    ],
)
def test_bad_arguments_are_named(change: dict, options: dict, message: str) -> None:
    inputs = dict(zip(NAMES, tokens(6), strict=True))
    for name, edit in change.items():
        inputs[name] = edit(inputs[name])
    with pytest.raises(ValueError, match=message):
        pool(**inputs, **options)  # type: ignore[call-overload]
