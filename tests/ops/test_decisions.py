"""Logits of the decisions, as docs/algorithm.md, section 1, writes them."""

import pytest
import torch

from megatron_dmc.ops.decisions import (
    clear_channel,
    hard_merge_logits,
    neuron_logits,
    omega_from_logits,
    omega_of_absorbed,
    projection_logits,
    relaxed_merge_logits,
)
from tests.support.oracle import INFINITY, Draw, Shape, draw_attention

SHAPES = [Shape(2, 7, 4, 2, 8), Shape(1, 5, 3, 3, 16)]


@pytest.mark.parametrize("shape", SHAPES, ids=str)
def test_neuron_reads_the_last_channel_of_key_and_of_its_queries(shape: Shape) -> None:
    drawn = draw_attention(shape)
    query, key = drawn["query"], drawn["key"]
    decision_logits, omega_logits = neuron_logits(query, key, 5.0, 3.0)
    group = shape.heads // shape.kv_heads
    for head in range(shape.kv_heads):
        torch.testing.assert_close(decision_logits[..., head], key[:, :, head, -1] - 5)
        own = query[:, :, head * group : (head + 1) * group, -1]
        torch.testing.assert_close(omega_logits[..., head], own.mean(-1) + 3)


@pytest.mark.parametrize("shape", SHAPES, ids=str)
def test_projection_is_interleaved_per_kv_head(shape: Shape) -> None:
    projected = Draw(0).normal(shape.batch, shape.seq, 2 * shape.kv_heads)
    decision_logits, omega_logits = projection_logits(projected, 5.0, 2.0, 3.0)
    torch.testing.assert_close(decision_logits, 3 * projected[..., 0::2] - 5)
    torch.testing.assert_close(omega_logits, 3 * projected[..., 1::2] + 2)


def test_logits_are_float32_or_wider() -> None:
    drawn = draw_attention(SHAPES[0], dtype=torch.bfloat16)
    for logits in neuron_logits(drawn["query"], drawn["key"], 5.0, 5.0):
        assert logits.dtype == torch.float32
    for logits in projection_logits(torch.zeros(1, 2, 4, dtype=torch.bfloat16), 5.0, 5.0, 1.0):
        assert logits.dtype == torch.float32


def test_merge_logits_relaxed_and_hard() -> None:
    decision_logits = torch.tensor([-1.0, 0.0, 0.5])
    noise = torch.tensor([2.0, -1.0, 0.5])
    torch.testing.assert_close(relaxed_merge_logits(decision_logits, noise, 0.1), torch.tensor([10.0, -10.0, 10.0]))
    assert hard_merge_logits(decision_logits).tolist() == [-INFINITY, -INFINITY, INFINITY]


def test_omega_stays_above_zero() -> None:
    for floor in (2**-7, 2**-24):
        omega = omega_from_logits(torch.tensor([-INFINITY, 0.0, INFINITY]), floor)
        torch.testing.assert_close(omega, torch.tensor([0.0, 0.5, 1.0]) + floor)
        assert omega[0] == floor


def test_omega_of_absorbed_is_an_exponential_within_bounds() -> None:
    logits = torch.tensor([-INFINITY, -15.0, 0.0, 1.0, 8.0, INFINITY], requires_grad=True)
    omega = omega_of_absorbed(logits)
    torch.testing.assert_close(omega, torch.tensor([-15.0, -15.0, 0.0, 1.0, 8.0, 8.0]).exp())
    omega.sum().backward()
    assert logits.grad is not None and logits.grad.isfinite().all() and logits.grad[2] == 1


def test_clear_channel_stops_the_gradient_of_the_last_channel() -> None:
    x = Draw(0).normal(2, 3, 4).requires_grad_()
    cleared = clear_channel(x)
    assert not cleared[..., -1].any() and torch.equal(cleared[..., :-1], x[..., :-1])
    cleared.sum().backward()
    assert x.grad is not None and x.grad.sum(dim=(0, 1)).tolist() == [6, 6, 6, 0]
