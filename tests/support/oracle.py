"""Inputs of operations, and the comparison of a fast form with its oracle: outputs and all gradients."""

from collections.abc import Callable, Mapping, Sequence
from typing import Any, Literal, NamedTuple

import torch
from torch import Tensor

INFINITY = float("inf")

# soft: alpha within (0, 1); hard: 0 or 1, 84 % merge, so that long slots occur; mixed: half of each.
Decisions = Literal["soft", "hard", "mixed", "none", "all"]


class Shape(NamedTuple):
    """Sizes of an operation; as a test's id B2-T63-H4-D16, or B2-T63-H4-KV2-D16 where heads share a KV head."""

    batch: int
    seq: int
    heads: int
    kv_heads: int
    head_dim: int

    def __str__(self) -> str:
        shared = "" if self.heads == self.kv_heads else f"-KV{self.kv_heads}"
        return f"B{self.batch}-T{self.seq}-H{self.heads}{shared}-D{self.head_dim}"


class Draw:
    """Float64 tensors from one seed, so that every dtype gets the same numbers."""

    def __init__(self, seed: int) -> None:
        self.generator = torch.Generator().manual_seed(seed)

    def normal(self, *size: int) -> Tensor:
        return torch.randn(*size, generator=self.generator, dtype=torch.float64)

    def uniform(self, *size: int) -> Tensor:
        return torch.rand(*size, generator=self.generator, dtype=torch.float64)

    def merge_logits(self, shape: Shape, decisions: Decisions) -> Tensor:
        """[batch, seq, kv_heads], ±inf where a decision is binary."""
        size = shape.batch, shape.seq, shape.kv_heads
        soft, uniform = 4 * self.normal(*size), self.uniform(*size)
        hard = torch.where(self.normal(*size) > -1, INFINITY, -INFINITY).double()
        return {
            "soft": soft,
            "hard": hard,
            "mixed": torch.where(uniform < 0.5, soft, hard),
            "none": torch.full_like(soft, -INFINITY),
            "all": torch.full_like(soft, INFINITY),
        }[decisions]

    def omega(self, shape: Shape) -> Tensor:
        """[batch, seq, kv_heads]"""
        return torch.sigmoid(2 * self.normal(shape.batch, shape.seq, shape.kv_heads)) + 2**-7


def draw_attention(
    shape: Shape,
    *,
    decisions: Decisions = "mixed",
    channel: int | None = None,
    dtype: torch.dtype = torch.float64,
    seed: int = 0,
    absorbs: bool = False,
) -> dict[str, Tensor]:
    """windowed_dmc_attention's tensors by name; ``channel`` is zero in query and keys, and the logits are float32 or wider.

    ``absorbs``: with omega, over the range that clamped logits have.
    """
    draw = Draw(seed)
    batch, seq, heads, kv_heads, head_dim = shape
    tensors = {"query": draw.normal(batch, seq, heads, head_dim)}
    for name in ("key", "value", "pooled_key", "pooled_value"):
        tensors[name] = draw.normal(batch, seq, kv_heads, head_dim)
    if channel is not None:
        for name in ("query", "key", "pooled_key"):
            tensors[name][..., channel] = 0
    wide = torch.promote_types(dtype, torch.float32)
    merge_logits = draw.merge_logits(shape, decisions).to(wide)
    drawn = {name: x.to(dtype) for name, x in tensors.items()} | {"merge_logits": merge_logits}
    if absorbs:
        drawn["omega"] = (3 * draw.normal(batch, seq, kv_heads)).clamp(-15, 8).exp().to(wide)
    return drawn


def takes_omega(attend: Callable[..., Tensor]) -> Callable[..., Tensor]:
    """windowed_dmc_attention with omega as one more positional argument, which may be absent."""

    def function(*tensors: Tensor, **options: Any) -> Tensor:
        return attend(*tensors[:6], **options, **({"omega": tensors[6]} if len(tensors) > 6 else {}))

    return function


def draw_pooling(
    shape: Shape, *, decisions: Decisions = "mixed", dtype: torch.dtype = torch.float64, seed: int = 0
) -> dict[str, Tensor]:
    """pool's tensors by name."""
    draw = Draw(seed)
    batch, seq, _, kv_heads, head_dim = shape
    tensors = {name: draw.normal(batch, seq, kv_heads, head_dim) for name in ("key", "value")}
    tensors["alpha"] = torch.sigmoid(draw.merge_logits(shape, decisions))
    tensors["omega"] = draw.omega(shape)
    return {name: x.to(dtype) for name, x in tensors.items()}


def outputs_and_gradients(function: Callable[..., Any], inputs: Sequence[Tensor]) -> tuple[list[Tensor], list[Tensor]]:
    """The function's outputs, and the gradients of a fixed random projection of them; zero where an input is not read."""
    leaves = [x.detach().clone().requires_grad_() for x in inputs]
    result = function(*leaves)
    outputs = [result] if isinstance(result, Tensor) else list(result)
    draw = Draw(1)
    torch.autograd.backward(outputs, [draw.normal(*x.shape).to(x.dtype) for x in outputs])
    gradients = [torch.zeros_like(x) if x.grad is None else x.grad for x in leaves]
    assert [g.dtype for g in gradients] == [x.dtype for x in inputs]
    return [x.detach() for x in outputs], gradients


def relative_error(got: Tensor, expected: Tensor, floor: float = 0.1) -> float:
    """In the Euclidean norm; infinite if anything is not finite.

    Where a gradient is zero (a query that sees only its own slot) only rounding is left: the norm counts as ``floor`` there.
    """
    error = (got.double() - expected.double()).norm() / expected.double().norm().clamp(min=floor)
    return float(error) if got.isfinite().all() else INFINITY


def assert_equals_oracle(
    fast: Callable[..., Any],
    oracle: Callable[..., Any],
    inputs: Mapping[str, Tensor],
    tolerance: float,
    *,
    bias_channel: int | None = None,
    floor: float = 0.1,
) -> None:
    """Outputs and gradients of both: the fast form in the inputs' dtype, the oracle on the same numbers in float64.

    Args:
        fast, oracle: take the inputs' tensors in their order.
        bias_channel: the caller's channel of query and keys, through which no gradient may come back.
        floor: as relative_error's.
    """
    outputs, gradients = outputs_and_gradients(fast, list(inputs.values()))
    expected, expected_gradients = outputs_and_gradients(oracle, [x.double() for x in inputs.values()])
    if bias_channel is not None:
        for name, got, wanted in zip(inputs, gradients, expected_gradients, strict=True):
            if name in ("query", "key", "pooled_key"):
                assert not got[..., bias_channel].any(), f"d {name} in the bias channel"
                wanted[..., bias_channel] = 0
    names = [*(f"output {i}" for i in range(len(outputs))), *(f"d {name}" for name in inputs)]
    pairs = zip([*outputs, *gradients], [*expected, *expected_gradients], strict=True)
    errors = {name: relative_error(*pair, floor) for name, pair in zip(names, pairs, strict=True)}
    assert max(errors.values()) <= tolerance, errors
