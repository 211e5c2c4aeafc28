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
from tests.support.oracle import Shape, assert_equals_oracle, draw_attention, outputs_and_gradients

OPERATIONS = ("merge", "evict")


def inputs(
    seq: int, *, batch: int = 2, heads: int = 4, kv_heads: int = 2, head_dim: int = 8, **options: Any
) -> list[Tensor]:
    """windowed_dmc_attention's tensors; options are draw_attention's."""
    return list(draw_attention(Shape(batch, seq, heads, kv_heads, head_dim), seed=seq, **options).values())


def output_and_gradients(tensors: Sequence[Tensor], **options: Any) -> list[Tensor]:
    outputs, gradients = outputs_and_gradients(partial(windowed_dmc_attention, **options), tensors)
    return [*outputs, *gradients]


def assert_equal_to_oracle(shape: Shape, tolerance: float, **options: Any) -> None:
    """Options are windowed_dmc_attention's, bias_channel and dtype for the fast form only."""
    channel, dtype = options.pop("bias_channel", None), options.pop("dtype", torch.float64)
    drawn = draw_attention(shape, channel=channel, dtype=dtype, seed=shape.seq)
    fast = partial(windowed_dmc_attention, bias_channel=channel, **options)
    oracle = partial(windowed_dmc_attention, backend="naive", **options)
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


@pytest.mark.parametrize("channel", [None, -1], ids=lambda c: f"channel{c}")
def test_without_a_window_it_is_dmc_attention_to_the_last_bit(channel: int | None) -> None:
    query, key, value, pooled_key, pooled_value, merge_logits = inputs(70, channel=channel, dtype=torch.float32)
    windowed = windowed_dmc_attention(
        query, key, value, pooled_key, pooled_value, merge_logits, local_window=0, bias_channel=channel
    )
    assert torch.equal(windowed, dmc_attention(query, pooled_key, pooled_value, merge_logits, bias_channel=channel))


@pytest.mark.parametrize("operation", OPERATIONS)
def test_a_window_over_the_whole_text_is_plain_attention(operation: str) -> None:
    tensors = inputs(50)
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
    tensors = inputs(seq, batch=1, heads=heads, head_dim=head_dim, dtype=torch.float32)
    with Largest() as largest:
        output_and_gradients(tensors, local_window=local_window, operation=operation)
    # Blocks of keys overlap by a window less one: at most twice the keys.
    assert largest.elements <= max(2 * (seq + 256) * heads * head_dim, 2 * local_window * local_window)


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"local_window": -1}, "local_window must be >= 0 for merge, got -1"),
        ({"local_window": 0, "operation": "evict"}, "local_window must be >= 1 for evict, got 0"),
        ({"local_window": 1, "operation": "drop"}, "operation must be merge or evict, got 'drop'"),
        ({"local_window": 1, "backend": "cuda"}, "backend must be auto, torch or naive"),
    ],
)
def test_bad_arguments_are_named(options: dict, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        windowed_dmc_attention(*inputs(5), **options)
