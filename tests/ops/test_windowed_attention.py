"""Attention with a window of raw keys against its dense oracle, DMS as written, and its corners."""

import math
from collections.abc import Sequence
from functools import partial
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

from megatron_dmc.ops.attention import dmc_attention, windowed_dmc_attention
from tests.support.oracle import (
    INFINITY,
    Decisions,
    Shape,
    assert_equals_oracle,
    draw_attention,
    outputs_and_gradients,
    takes_omega,
)

OPERATIONS = ("merge", "evict", "absorb")
attend = takes_omega(windowed_dmc_attention)


def inputs(
    seq: int, *, batch: int = 2, heads: int = 4, kv_heads: int = 2, head_dim: int = 8, **options: Any
) -> list[Tensor]:
    """windowed_dmc_attention's tensors; options are draw_attention's."""
    return list(draw_attention(Shape(batch, seq, heads, kv_heads, head_dim), seed=seq, **options).values())


def output_and_gradients(tensors: Sequence[Tensor], **options: Any) -> list[Tensor]:
    outputs, gradients = outputs_and_gradients(partial(attend, **options), tensors)
    return [*outputs, *gradients]


def assert_equal_to_oracle(shape: Shape, tolerance: float, **options: Any) -> None:
    """Options are windowed_dmc_attention's; bias_channel, dtype and decisions for the fast form only."""
    channel, dtype = options.pop("bias_channel", None), options.pop("dtype", torch.float64)
    decisions: Decisions = options.pop("decisions", "mixed")
    absorbs = options["operation"] == "absorb"
    drawn = draw_attention(shape, channel=channel, dtype=dtype, decisions=decisions, seed=shape.seq, absorbs=absorbs)
    fast = partial(attend, bias_channel=channel, **options)
    oracle = partial(attend, backend="naive", **options)
    assert_equals_oracle(fast, oracle, drawn, tolerance, bias_channel=channel)


@pytest.mark.parametrize("channel", [None, -1], ids=lambda c: f"channel{c}")
@pytest.mark.parametrize("operation", OPERATIONS)
@pytest.mark.parametrize("local_window", [1, 2, 16, 31, 32, 33, 64, 500], ids=lambda w: f"w{w}")
@pytest.mark.parametrize(
    "shape",
    [
        Shape(2, 1, 2, 1, 8),
        Shape(2, 33, 2, 2, 8),
        Shape(2, 63, 4, 2, 16),
        Shape(1, 130, 6, 3, 8),
        Shape(1, 1100, 2, 1, 8),
    ],
    ids=str,
)
def test_equals_the_oracle(shape: Shape, local_window: int, operation: str, channel: int | None) -> None:
    assert_equal_to_oracle(shape, 1e-12, local_window=local_window, operation=operation, bias_channel=channel)


@pytest.mark.parametrize("decisions", ["soft", "hard", "none", "all"])
@pytest.mark.parametrize("operation", OPERATIONS)
def test_every_kind_of_decision_equals_the_oracle(operation: str, decisions: str) -> None:
    assert_equal_to_oracle(Shape(2, 63, 4, 2, 16), 1e-12, local_window=5, operation=operation, decisions=decisions)


@pytest.mark.parametrize("operation", OPERATIONS)
@pytest.mark.parametrize(("dtype", "tolerance"), [(torch.float32, 2e-6), (torch.bfloat16, 2e-2)], ids=["fp32", "bf16"])
def test_lower_precision_stays_near_the_oracle(dtype: torch.dtype, tolerance: float, operation: str) -> None:
    options = {"local_window": 20, "operation": operation, "softmax_scale": 0.2}
    assert_equal_to_oracle(Shape(2, 257, 4, 2, 64), tolerance, dtype=dtype, **options)


@pytest.mark.parametrize("operation", OPERATIONS)
@pytest.mark.parametrize("local_window", [1, 7, 40])
def test_documents_equal_the_oracle(local_window: int, operation: str) -> None:
    starts = torch.zeros(2, 90, dtype=torch.bool)
    starts[0, [1, 20, 21, 64]] = True
    options = {"local_window": local_window, "operation": operation, "document_starts": starts}
    assert_equal_to_oracle(Shape(2, 90, 4, 2, 8), 1e-12, **options)


def test_evict_is_dms_as_written() -> None:
    """DMS (arXiv 2506.05345, section 3.2): a mask M[i, j] = log(1 - alpha_j) where i - j >= w, none in the window."""
    seq, window = 41, 6
    query, key, value, pooled_key, pooled_value, merge_logits = inputs(seq)
    out = windowed_dmc_attention(
        query, key, value, pooled_key, pooled_value, merge_logits, local_window=window, operation="evict"
    )
    alpha = torch.sigmoid(merge_logits)
    alpha[:, 0] = 0
    for b in range(len(query)):
        for head in range(query.shape[2]):
            kv = head // 2
            for i in range(seq):
                scores = []
                for j in range(i + 1):
                    mask = torch.log(1 - alpha[b, j, kv]) if i - j >= window else 0.0
                    scores.append(query[b, i, head] @ key[b, j, kv] / math.sqrt(query.shape[-1]) + mask)
                expected = torch.softmax(torch.stack(scores), 0) @ value[b, : i + 1, kv]
                torch.testing.assert_close(out[b, i, head], expected, rtol=1e-12, atol=1e-12)


def test_absorb_sees_the_mean_of_what_was_evicted() -> None:
    """Binary decisions, omega 1: the residual slot is the absorbed tokens' mean, with the weight of their number."""
    seq, window = 41, 6
    query, key, value, _, _, merge_logits, _ = inputs(seq, decisions="hard", absorbs=True)
    ones = torch.ones_like(merge_logits)
    out = attend(query, key, value, key, value, merge_logits, ones, local_window=window, operation="absorb")
    for b in range(len(query)):
        for head in range(query.shape[2]):
            kv = head // 2
            for i in range(seq):
                gone = [j for j in range(1, i - window + 1) if merge_logits[b, j, kv] > 0]
                kept = [j for j in range(i + 1) if j not in gone]
                keys, values = key[b, kept, kv], value[b, kept, kv]
                weights = torch.ones(len(kept), dtype=torch.float64)
                if gone:
                    keys = torch.cat([keys, key[b, gone, kv].mean(0, keepdim=True)])
                    values = torch.cat([values, value[b, gone, kv].mean(0, keepdim=True)])
                    weights = torch.cat([weights, torch.tensor([float(len(gone))], dtype=torch.float64)])
                scores = keys @ query[b, i, head] / math.sqrt(query.shape[-1]) + weights.log()
                torch.testing.assert_close(out[b, i, head], scores.softmax(0) @ values, rtol=1e-12, atol=1e-12)


def test_absorb_without_weight_is_evict() -> None:
    *tensors, omega = inputs(130, absorbs=True)
    expected = output_and_gradients(tensors, local_window=9, operation="evict")
    for light in (0.0, 1e-30, 1e-20):
        found = output_and_gradients([*tensors, torch.full_like(omega, light)], local_window=9, operation="absorb")
        for got, wanted in zip(found[:7], expected, strict=True):
            torch.testing.assert_close(got, wanted, rtol=1e-12, atol=1e-12)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=["fp32", "bf16"])
@pytest.mark.parametrize("decisions", ["hard", "all", "none", "mixed"])
def test_gradients_of_absorb_are_finite(decisions: Decisions, dtype: torch.dtype) -> None:
    """And binary logits get none: nothing would change."""
    tensors = inputs(100, decisions=decisions, dtype=dtype, absorbs=True)
    out, *gradients = output_and_gradients(tensors, local_window=3, operation="absorb")
    assert all(x.isfinite().all() for x in (out, *gradients))
    assert not gradients[5][tensors[5].abs() == INFINITY].any()


def test_absorb_never_sees_the_future_nor_another_row() -> None:
    tensors = inputs(70, decisions="mixed", absorbs=True)
    out = attend(*tensors, local_window=4, operation="absorb")
    changed = [x.clone() for x in tensors]
    for x in changed[1:]:
        x[0, 40:] = x[0, 40:].flip(0)
    again = attend(*changed, local_window=4, operation="absorb")
    assert torch.equal(out[0, :40], again[0, :40]) and torch.equal(out[1], again[1])


@pytest.mark.parametrize("channel", [None, -1], ids=lambda c: f"channel{c}")
def test_without_a_window_it_is_dmc_attention_to_the_last_bit(channel: int | None) -> None:
    query, key, value, pooled_key, pooled_value, merge_logits = inputs(70, channel=channel, dtype=torch.float32)
    windowed = windowed_dmc_attention(
        query, key, value, pooled_key, pooled_value, merge_logits, local_window=0, bias_channel=channel
    )
    assert torch.equal(windowed, dmc_attention(query, pooled_key, pooled_value, merge_logits, bias_channel=channel))


@pytest.mark.parametrize("operation", OPERATIONS)
def test_a_window_over_the_whole_text_is_plain_attention(operation: str) -> None:
    tensors = inputs(50, absorbs=operation == "absorb")
    query, key, value = (x.transpose(1, 2) for x in tensors[:3])
    plain = F.scaled_dot_product_attention(query, key, value, is_causal=True, enable_gqa=True).transpose(1, 2)
    out, *gradients = output_and_gradients(tensors, local_window=50, operation=operation)
    torch.testing.assert_close(out, plain, rtol=1e-13, atol=1e-13)
    assert not any(gradient.any() for gradient in gradients[3:])


def test_one_tensor_as_raw_keys_and_as_slots_has_one_gradient() -> None:
    query, key, value, _, _, merge_logits = inputs(33)
    key.requires_grad_(), value.requires_grad_()

    def gradients(backend: str) -> tuple[Tensor, ...]:
        out = windowed_dmc_attention(query, key, value, key, value, merge_logits, local_window=5, backend=backend)
        return torch.autograd.grad(out.square().sum(), (key, value))

    for x, y in zip(gradients("auto"), gradients("naive"), strict=True):
        torch.testing.assert_close(x, y, rtol=1e-12, atol=1e-12)


class Largest(TorchDispatchMode):
    """The most elements that an operation's result has."""

    def __init__(self) -> None:
        super().__init__()
        self.elements = 0

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        result = func(*args, **(kwargs or {}))
        for leaf in tree_leaves(result):
            if isinstance(leaf, Tensor):
                self.elements = max(self.elements, leaf.untyped_storage().nbytes() // leaf.element_size())
        return result


@pytest.mark.parametrize("operation", OPERATIONS)
@pytest.mark.parametrize("local_window", [16, 256])
def test_no_tensor_grows_with_the_square_of_the_sequence(local_window: int, operation: str) -> None:
    seq, heads, head_dim = 2048, 2, 16
    options: dict[str, Any] = {"dtype": torch.float32, "absorbs": operation == "absorb"}
    tensors = inputs(seq, batch=1, heads=heads, head_dim=head_dim, **options)
    with Largest() as largest:
        output_and_gradients(tensors, local_window=local_window, operation=operation)
    # Blocks of keys overlap by a window less one: at most twice the keys.
    assert largest.elements <= max(2 * (seq + 256) * heads * head_dim, 2 * local_window * local_window)


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"local_window": -1}, "local_window must be >= 0 for merge, got -1"),
        ({"local_window": 0, "operation": "evict"}, "local_window must be >= 1 for evict, got 0"),
        ({"local_window": 0, "operation": "absorb"}, "local_window must be >= 1 for absorb, got 0"),
        ({"local_window": 1, "operation": "drop"}, "operation must be merge, evict or absorb, got 'drop'"),
        ({"local_window": 1, "operation": "absorb"}, "operation absorb needs omega, the tokens' weights"),
        ({"local_window": 1, "omega": torch.ones(2, 5, 2)}, "operation merge takes no omega; leave it out"),
        ({"local_window": 1, "operation": "absorb", "omega": torch.ones(2, 5)}, r"omega must be .* \(2, 5, 2\), got"),
        ({"local_window": 1, "backend": "cuda"}, "backend must be auto, torch or naive"),
    ],
)
def test_bad_arguments_are_named(options: dict, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        windowed_dmc_attention(*inputs(5), **options)
