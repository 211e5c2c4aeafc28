"""Attention over slot states against its dense oracle, plain attention, and a decoder with a list of slots."""

import math
from collections.abc import Callable, Sequence
from functools import partial
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

from megatron_dmc.ops.attention import dmc_attention, flash_cpu, naive
from megatron_dmc.ops.attention.diagonal import diagonal_forward
from megatron_dmc.ops.attention.fading_keys import FarKeys
from megatron_dmc.ops.attention.types import KernelSettings
from megatron_dmc.ops.pooling import pool
from megatron_dmc.ops.rotary import rotate
from tests.support.oracle import INFINITY, Shape, assert_equals_oracle, draw_attention, outputs_and_gradients

NAMES = ("query", "key", "value", "merge_logits")


def slots(
    seq: int, *, batch: int = 2, heads: int = 4, kv_heads: int = 2, head_dim: int = 16, **options: Any
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """query, key, value, merge_logits; options are draw_attention's."""
    return of_slots(Shape(batch, seq, heads, kv_heads, head_dim), **options)


def of_slots(shape: Shape, **options: Any) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    drawn = draw_attention(shape, **{"decisions": "soft"} | options)
    return tuple(drawn[name] for name in NAMES)  # type: ignore[return-value]


def output_and_gradients(inputs: Sequence[Tensor], **options: Any) -> list[Tensor]:
    outputs, gradients = outputs_and_gradients(partial(dmc_attention, **options), inputs)
    return [*outputs, *gradients]


def assert_equal_to_oracle(
    inputs: Sequence[Tensor], tolerance: float, channel: int | None = None, **options: Any
) -> None:
    fast = partial(dmc_attention, bias_channel=channel, **options)
    oracle = partial(dmc_attention, backend="naive", **options)
    assert_equals_oracle(fast, oracle, dict(zip(NAMES, inputs, strict=True)), tolerance, bias_channel=channel)


@pytest.mark.parametrize("channel", [None, -1], ids=lambda c: f"channel{c}")
@pytest.mark.parametrize("decisions", ["soft", "hard", "mixed"])
@pytest.mark.parametrize(
    "shape",
    [
        Shape(2, 1, 2, 2, 8),
        Shape(2, 2, 2, 1, 8),
        Shape(1, 63, 3, 3, 16),
        Shape(2, 97, 8, 2, 32),
        Shape(1, 129, 4, 1, 64),
        Shape(1, 515, 2, 1, 8),
    ],
    ids=str,
)
def test_equals_the_oracle(shape: Shape, decisions: str, channel: int | None) -> None:
    assert_equal_to_oracle(of_slots(shape, decisions=decisions, channel=channel), 1e-12, channel)


@pytest.mark.parametrize("channel", [None, -1], ids=lambda c: f"channel{c}")
def test_a_kernel_without_groups_of_query_heads(channel: int | None, monkeypatch: pytest.MonkeyPatch) -> None:
    """torch before 2.9 reads beyond the keys where they have fewer heads: it never sees such keys."""
    monkeypatch.setattr(flash_cpu, "KNOWS_GROUPS", False)
    seen = []
    original = flash_cpu.aten._scaled_dot_product_flash_attention_for_cpu

    def kernel(query: Tensor, key: Tensor, *others: Any, **options: Any) -> Any:
        seen.append((query.shape[1], key.shape[1]))
        return original(query, key, *others, **options)

    monkeypatch.setattr(flash_cpu.aten, "_scaled_dot_product_flash_attention_for_cpu", kernel)
    assert_equal_to_oracle(of_slots(Shape(2, 97, 8, 2, 32), decisions="mixed", channel=channel), 1e-12, channel)
    assert seen == [(8, 8)]


@pytest.mark.parametrize("channel", [None, -1, 3], ids=lambda c: f"channel{c}")
@pytest.mark.parametrize("scale", [0.05, 1.0, 1.7])
def test_softmax_scale(scale: float, channel: int | None) -> None:
    assert_equal_to_oracle(slots(65, channel=channel), 1e-12, channel, softmax_scale=scale)


@pytest.mark.parametrize("channel", [None, -1], ids=lambda c: f"channel{c}")
@pytest.mark.parametrize("decisions", ["soft", "hard", "mixed"])
@pytest.mark.parametrize(
    ("dtype", "tolerance"), [(torch.float32, 2e-6), (torch.bfloat16, 2e-2)], ids=["float32", "bfloat16"]
)
def test_lower_precision_stays_near_the_oracle(
    dtype: torch.dtype, tolerance: float, decisions: str, channel: int | None
) -> None:
    assert_equal_to_oracle(
        slots(257, head_dim=64, decisions=decisions, channel=channel, dtype=dtype), tolerance, channel
    )


@pytest.mark.parametrize("magnitude", [8.0, 15.0, 20.0])
def test_small_gradients_of_large_logits_are_exact(magnitude: float) -> None:
    """At temperature 0.1 logits are large: alpha and 1 - alpha must keep their digits at both ends in float32."""
    query, key, value, merge_logits = slots(65, dtype=torch.float32)
    inputs = query, key, value, merge_logits.sign() * magnitude
    assert_equal_to_oracle(inputs, 3e-6)
    got = output_and_gradients(inputs)[4].double()
    expected = output_and_gradients([x.double() for x in inputs], backend="naive")[4]
    for end in (inputs[3] > 0, inputs[3] < 0):
        assert (got - expected)[end].norm() <= 1e-4 * expected[end].norm()


def test_enormous_logits_are_binary_decisions() -> None:
    query, key, value, merge_logits = slots(65, dtype=torch.float32)
    soft = output_and_gradients((query, key, value, merge_logits.sign() * 1e6))
    hard = output_and_gradients((query, key, value, merge_logits.sign() * INFINITY))
    for x, y in zip(soft, hard, strict=True):
        torch.testing.assert_close(x, y, rtol=1e-5, atol=1e-6)


def test_log_sum_exp() -> None:
    query, key, value, merge_logits = slots(33, heads=8, decisions="mixed")
    fade_logits = F.pad(merge_logits[:, 1:], (0, 0, 0, 1), value=-INFINITY)
    settings = KernelSettings(softmax_scale=0.25)
    lse = diagonal_forward(query, FarKeys(key, value, fade_logits), settings).lse
    _, expected = naive.dmc_attention(query, key, value, merge_logits, 0.25)
    torch.testing.assert_close(lse, expected, rtol=1e-12, atol=1e-12)
    query, *far = slots(33, heads=8, dtype=torch.bfloat16)
    out, lse = diagonal_forward(query, FarKeys(*far), settings)
    assert out.dtype == torch.bfloat16 and lse.dtype == torch.float32 and lse.shape == (2, 33, 8)


def test_the_first_logit_is_ignored() -> None:
    query, key, value, merge_logits = slots(9)
    changed = merge_logits.clone()
    changed[:, 0] = INFINITY
    assert torch.equal(dmc_attention(query, key, value, merge_logits), dmc_attention(query, key, value, changed))
    gradient = output_and_gradients((query, key, value, changed))[4]
    assert not gradient[:, 0].any()


def starts_at(seq: int, *rows: list[int]) -> Tensor:
    starts = torch.zeros(len(rows), seq, dtype=torch.bool)
    for row, places in enumerate(rows):
        starts[row, places] = True
    return starts


@pytest.mark.parametrize("channel", [None, -1], ids=lambda c: f"channel{c}")
@pytest.mark.parametrize("decisions", ["soft", "mixed"])
@pytest.mark.parametrize(
    "rows",
    [
        pytest.param(([5], []), id="one"),
        pytest.param(([0, 1, 2, 3, 35], [33, 34, 65]), id="many"),
        pytest.param((list(range(66)), [16, 32, 48, 64]), id="every-token-alone"),
        pytest.param(([0], []), id="none-inside"),
    ],
)
def test_documents_equal_the_oracle(rows: tuple[list[int], ...], decisions: str, channel: int | None) -> None:
    inputs = slots(66, decisions=decisions, channel=channel)
    assert_equal_to_oracle(inputs, 1e-12, channel, document_starts=starts_at(66, *rows))


def test_documents_do_not_see_one_another() -> None:
    starts = starts_at(80, [20, 50], [41])
    inputs = slots(80)
    before = output_and_gradients(inputs, document_starts=starts)
    changed = [x.clone() for x in inputs]
    for x in changed:
        x[0, 20:50] = torch.randn_like(x[0, 20:50])
    after = output_and_gradients(changed, document_starts=starts)
    others = torch.ones(2, 80, dtype=torch.bool)
    others[0, 20:50] = False
    for x, y in zip(before, after, strict=True):
        assert torch.equal(x[others], y[others])
        assert not torch.equal(x[~others], y[~others])


def test_the_first_logit_of_a_document_is_ignored() -> None:
    starts = starts_at(80, [20, 50], [41])
    query, key, value, merge_logits = slots(80)
    before = output_and_gradients((query, key, value, merge_logits), document_starts=starts)
    starts = starts_at(80, [0, 20, 50], [0, 41])
    changed = merge_logits.masked_fill(starts[..., None], INFINITY)
    after = output_and_gradients((query, key, value, changed), document_starts=starts)
    assert all(torch.equal(x, y) for x, y in zip(before, after, strict=True))
    assert not before[4][starts].any()


def test_documents_equal_separate_sequences() -> None:
    inputs = slots(70, batch=1)
    whole = dmc_attention(*inputs, document_starts=starts_at(70, [13]))
    for part in (slice(0, 13), slice(13, 70)):
        alone = dmc_attention(*(x[:, part] for x in inputs))
        torch.testing.assert_close(whole[:, part], alone, rtol=1e-13, atol=1e-13)


@settings(max_examples=20, deadline=None)
@given(
    seq=st.integers(1, 150),
    kv_heads=st.sampled_from([1, 2, 3]),
    group=st.sampled_from([1, 2, 4]),
    dtype=st.sampled_from([torch.float64, torch.float32]),
    seed=st.integers(0, 10**6),
)
def test_without_merging_it_is_plain_causal_attention(
    seq: int, kv_heads: int, group: int, dtype: torch.dtype, seed: int
) -> None:
    inputs = slots(seq, heads=group * kv_heads, kv_heads=kv_heads, decisions="none", dtype=dtype, seed=seed)
    query, key, value, _ = (x.transpose(1, 2) for x in inputs)
    plain = F.scaled_dot_product_attention(query, key, value, is_causal=True, enable_gqa=True).transpose(1, 2)
    tolerance = 1e-13 if dtype == torch.float64 else 2e-6
    torch.testing.assert_close(dmc_attention(*inputs), plain, rtol=tolerance, atol=tolerance)


@settings(max_examples=20, deadline=None)
@given(seq=st.integers(1, 100), seed=st.integers(0, 10**6))
def test_when_all_merge_a_query_sees_its_own_slot_only(seq: int, seed: int) -> None:
    inputs = slots(seq, heads=2, decisions="all", seed=seed)
    torch.testing.assert_close(dmc_attention(*inputs), inputs[2], rtol=1e-13, atol=1e-13)


@settings(max_examples=15, deadline=None)
@given(seq=st.integers(2, 90), cut=st.floats(0, 1), seed=st.integers(0, 10**6))
def test_nothing_depends_on_the_future(seq: int, cut: float, seed: int) -> None:
    """Up to the merge of token t + 1, of which query t's own slot knows nothing."""
    inputs = slots(seq, decisions="mixed", seed=seed)
    at = 1 + int(cut * (seq - 1))
    changed = [x.clone() for x in inputs]
    for x in changed:
        x[:, at:] = torch.randn(x[:, at:].shape, dtype=x.dtype)
    whole, other = dmc_attention(*inputs), dmc_attention(*changed)
    torch.testing.assert_close(whole[:, :at], other[:, :at], rtol=1e-12, atol=1e-12)


# The equivalence that the project stands on, at the level of its operations.


def decode(
    query: Tensor, key: Tensor, value: Tensor, alpha: Tensor, omega: Tensor, turn: Callable[[Tensor, int], Tensor]
) -> Tensor:
    """A decoder with a list of slots, one KV head: query [seq, heads, d]; key, value [seq, d]; alpha, omega [seq]."""
    cache: list[tuple[Tensor, Tensor, Tensor, int]] = []  # N_k, N_v, z, position of the latest token
    outputs = []
    for t in range(len(key)):
        entry = (omega[t] * key[t], omega[t] * value[t], omega[t])
        if t > 0 and alpha[t] == 1:
            entry = tuple(old + new for old, new in zip(cache.pop()[:3], entry, strict=True))  # type: ignore[assignment]
        cache.append((*entry, t))
        keys = torch.stack([turn(key_sum / z, position) for key_sum, _, z, position in cache])
        values = torch.stack([value_sum / z for _, value_sum, z, _ in cache])
        probability = torch.softmax(turn(query[t], t) @ keys.T / math.sqrt(key.shape[-1]), dim=-1)
        outputs.append(probability @ values)
    return torch.stack(outputs)


@pytest.mark.parametrize("channel", [None, -1], ids=lambda c: f"channel{c}")
@pytest.mark.parametrize("merge_rate", [0.0, 0.5, 0.9, 1.0])
@pytest.mark.parametrize(("heads", "kv_heads"), [(2, 2), (4, 1), (8, 2)], ids=["MHA", "MQA", "GQA"])
def test_training_form_with_binary_alpha_is_what_a_decoder_sees(
    heads: int, kv_heads: int, merge_rate: float, channel: int | None
) -> None:
    batch, seq, head_dim = 2, 67, 8
    query, key, value, _ = slots(seq, heads=heads, kv_heads=kv_heads, head_dim=head_dim, channel=channel)
    alpha = (torch.rand(batch, seq, kv_heads) < merge_rate).double()
    omega = torch.sigmoid(torch.randn(batch, seq, kv_heads, dtype=torch.float64)) + 2**-7
    frequency = 10000.0 ** -(torch.arange(head_dim // 2, dtype=torch.float64) * 2 / head_dim)
    if channel is not None:
        frequency[-1] = 0  # the free channel stays zero under rotation
    angle = torch.arange(seq, dtype=torch.float64)[:, None] * torch.cat([frequency, frequency])
    cos, sin = angle.cos()[None, :, None], angle.sin()[None, :, None]

    pooled_key, pooled_value = pool(key, value, alpha, omega)
    merge_logits = torch.where(alpha > 0, INFINITY, -INFINITY).double()
    rotated_query, rotated_key = rotate(query, cos, sin), rotate(pooled_key, cos, sin)
    out = dmc_attention(rotated_query, rotated_key, pooled_value, merge_logits, bias_channel=channel)

    def turn(x: Tensor, position: int) -> Tensor:
        rows = x.reshape(1, 1, -1, head_dim)
        return rotate(rows, cos[:, position, None], sin[:, position, None]).reshape(x.shape)

    for b in range(batch):
        for head, queries in enumerate(query[b].unflatten(1, (kv_heads, -1)).unbind(1)):
            k, v, merge, weight = (x[b, :, head] for x in (key, value, alpha, omega))
            decoded = decode(queries, k, v, merge, weight, turn)
            trained = out[b].unflatten(1, (kv_heads, -1))[:, head]
            torch.testing.assert_close(trained, decoded, rtol=1e-12, atol=1e-12)


class Sizes(TorchDispatchMode):
    """Records the number of elements of every tensor that an operation makes (views excepted)."""

    def __init__(self) -> None:
        super().__init__()
        self.made: list[tuple[int, str]] = []

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        result = func(*args, **(kwargs or {}))
        for leaf in tree_leaves(result):
            if isinstance(leaf, Tensor):
                self.made.append((leaf.untyped_storage().nbytes() // leaf.element_size(), str(func)))
        return result


@pytest.mark.parametrize("channel", [None, -1], ids=lambda c: f"channel{c}")
@pytest.mark.parametrize("decisions", ["soft", "hard"])
def test_no_tensor_grows_with_the_square_of_the_sequence(decisions: str, channel: int | None) -> None:
    seq, heads, head_dim = 2048, 2, 16
    inputs = slots(
        seq, batch=1, heads=heads, head_dim=head_dim, decisions=decisions, channel=channel, dtype=torch.float32
    )
    with Sizes() as sizes:
        output_and_gradients(inputs, bias_channel=channel)
    largest, operation = max(sizes.made)
    assert largest <= 2 * seq * heads * head_dim, f"{operation} makes {largest} elements"


@pytest.mark.parametrize("channel", [None, -1], ids=lambda c: f"channel{c}")
def test_keys_and_values_are_never_expanded_to_the_query_heads(channel: int | None) -> None:
    """The flash kernels get K and V with their own heads, forward and backward."""
    seen: list[list[int]] = []

    class Heads(TorchDispatchMode):
        def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
            if "flash_attention" in str(func):
                place = 1 if "backward" in str(func) else 0
                seen.append([x.shape[1] for x in args[place : place + 3]])
            return func(*args, **(kwargs or {}))

    with Heads():
        output_and_gradients(slots(65, heads=8, kv_heads=2, channel=channel), bias_channel=channel)
    assert seen == [[8, 2, 2], [8, 2, 2]]


@pytest.mark.parametrize(
    ("change", "options", "message"),
    [
        ({"value": lambda x: x[..., :4]}, {}, "keys and values"),
        ({"query": lambda x: x[:, :-1]}, {}, "query"),
        ({"query": lambda x: x[:, :, :3]}, {}, "kv_heads dividing heads"),
        ({"merge_logits": lambda x: x[..., :1]}, {}, "merge_logits must be"),
        ({}, {"backend": "cuda"}, "backend must be auto, torch or naive, got 'cuda'"),
    ],
    ids=["value-shape", "query-length", "heads", "logits-shape", "backend"],
)
def test_bad_arguments_are_named(change: dict, options: dict, message: str) -> None:
    inputs = dict(zip(NAMES, slots(6), strict=True))
    for name, edit in change.items():
        inputs[name] = edit(inputs[name])
    with pytest.raises(ValueError, match=message):
        dmc_attention(**inputs, **options)  # type: ignore[call-overload]
