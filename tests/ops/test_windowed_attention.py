"""Attention with a window of raw keys against its dense oracle, DMS as written, and its corners."""

import math
from collections.abc import Sequence
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

from megatron_dmc.ops.attention import dmc_attention, windowed_dmc_attention

torch.set_num_threads(1)
NAMES = ("query", "key", "value", "pooled_key", "pooled_value", "merge_logits")
OPERATIONS = ("merge", "evict")


def inputs(
    seq: int,
    *,
    batch: int = 2,
    heads: int = 4,
    kv_heads: int = 2,
    head_dim: int = 8,
    channel: int | None = None,
    dtype: torch.dtype = torch.float64,
) -> list[Tensor]:
    """NAMES' tensors; a third of the decisions are binary."""
    generator = torch.Generator().manual_seed(seq)
    shapes = [(batch, seq, h, head_dim) for h in (heads, *[kv_heads] * 4)]
    tensors = [torch.randn(shape, generator=generator, dtype=torch.float64) for shape in shapes]
    if channel is not None:
        for x in (tensors[0], tensors[1], tensors[3]):
            x[..., channel] = 0
    logits = 4 * torch.randn(batch, seq, kv_heads, generator=generator, dtype=torch.float64)
    binary = torch.rand(logits.shape, generator=generator) < 1 / 3
    logits = torch.where(binary, logits.sign() * math.inf, logits)
    return [*(x.to(dtype) for x in tensors), logits.to(torch.promote_types(dtype, torch.float32))]


def output_and_gradients(tensors: Sequence[Tensor], channel: int | None = None, **options: Any) -> list[Tensor]:
    """The output and all gradients of a random projection of it; those of the caller's channel left out."""
    leaves = [x.detach().clone().requires_grad_() for x in tensors]
    out = windowed_dmc_attention(*leaves, bias_channel=channel, **options)
    direction = torch.randn(out.shape, generator=torch.Generator().manual_seed(1), dtype=torch.float64)
    out.backward(direction.to(out.dtype))
    gradients = [torch.zeros_like(x) if x.grad is None else x.grad for x in leaves]
    if channel is not None:
        for gradient in (gradients[0], gradients[1], gradients[3]):
            gradient[..., channel] = 0
    return [out.detach(), *gradients]


def assert_equal_to_oracle(tensors: Sequence[Tensor], tolerance: float, channel: int | None, **options: Any) -> None:
    fast = output_and_gradients(tensors, channel, **options)
    oracle = output_and_gradients([x.double() for x in tensors], channel, backend="naive", **options)
    for name, x, y in zip(("out", *NAMES), fast, oracle, strict=True):
        assert x.isfinite().all(), name
        error = ((x.double() - y).norm() / y.norm().clamp(min=0.1)).item()
        assert error <= tolerance, (name, error)


@pytest.mark.parametrize("channel", [None, -1], ids=lambda c: f"channel{c}")
@pytest.mark.parametrize("operation", OPERATIONS)
@pytest.mark.parametrize("local_window", [1, 2, 16, 31, 32, 33, 64, 500], ids=lambda w: f"w{w}")
@pytest.mark.parametrize(
    ("batch", "seq", "heads", "kv_heads", "head_dim"),
    [(2, 1, 2, 1, 8), (2, 33, 2, 2, 8), (2, 63, 4, 2, 16), (1, 130, 6, 3, 8), (1, 1100, 2, 1, 8)],
    ids=["B2-T1-H2-KV1-D8", "B2-T33-H2-KV2-D8", "B2-T63-H4-KV2-D16", "B1-T130-H6-KV3-D8", "B1-T1100-H2-KV1-D8"],
)
def test_equals_the_oracle(
    batch: int,
    seq: int,
    heads: int,
    kv_heads: int,
    head_dim: int,
    local_window: int,
    operation: str,
    channel: int | None,
) -> None:
    tensors = inputs(seq, batch=batch, heads=heads, kv_heads=kv_heads, head_dim=head_dim, channel=channel)
    assert_equal_to_oracle(tensors, 1e-12, channel, local_window=local_window, operation=operation)


@pytest.mark.parametrize("operation", OPERATIONS)
@pytest.mark.parametrize(("dtype", "tolerance"), [(torch.float32, 2e-6), (torch.bfloat16, 2e-2)], ids=["fp32", "bf16"])
def test_lower_precision_stays_near_the_oracle(dtype: torch.dtype, tolerance: float, operation: str) -> None:
    tensors = inputs(257, head_dim=64, dtype=dtype)
    assert_equal_to_oracle(tensors, tolerance, None, local_window=20, operation=operation, softmax_scale=0.2)


@pytest.mark.parametrize("operation", OPERATIONS)
@pytest.mark.parametrize("local_window", [1, 7, 40])
def test_documents_equal_the_oracle(local_window: int, operation: str) -> None:
    starts = torch.zeros(2, 90, dtype=torch.bool)
    starts[0, [1, 20, 21, 64]] = True
    options = {"local_window": local_window, "operation": operation, "document_starts": starts}
    assert_equal_to_oracle(inputs(90), 1e-12, None, **options)


def test_evict_is_dms_as_written() -> None:
    """DMS (arXiv 2506.05345, section 3.2): a mask M[i, j] = log(1 - alpha_j) where i - j >= w, none in the window."""
    seq, window = 41, 6
    query, key, value, pooled_key, pooled_value, logits = inputs(seq)
    out = windowed_dmc_attention(
        query, key, value, pooled_key, pooled_value, logits, local_window=window, operation="evict"
    )
    alpha = torch.sigmoid(logits)
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
    query, key, value, pooled_key, pooled_value, logits = inputs(70, channel=channel, dtype=torch.float32)
    windowed = windowed_dmc_attention(
        query, key, value, pooled_key, pooled_value, logits, local_window=0, bias_channel=channel
    )
    assert torch.equal(windowed, dmc_attention(query, pooled_key, pooled_value, logits, bias_channel=channel))


@pytest.mark.parametrize("operation", OPERATIONS)
def test_a_window_over_the_whole_text_is_plain_attention(operation: str) -> None:
    tensors = inputs(50)
    query, key, value = (x.transpose(1, 2) for x in tensors[:3])
    plain = F.scaled_dot_product_attention(query, key, value, is_causal=True, enable_gqa=True).transpose(1, 2)
    out, *gradients = output_and_gradients(tensors, local_window=50, operation=operation)
    torch.testing.assert_close(out, plain, rtol=1e-13, atol=1e-13)
    assert not any(gradient.any() for gradient in gradients[3:])


def test_one_tensor_as_raw_keys_and_as_slots_has_one_gradient() -> None:
    query, key, value, _, _, logits = inputs(33)
    key.requires_grad_(), value.requires_grad_()

    def gradients(backend: str) -> tuple[Tensor, ...]:
        out = windowed_dmc_attention(query, key, value, key, value, logits, local_window=5, backend=backend)
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
