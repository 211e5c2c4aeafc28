"""The residual slot against its token-by-token oracle: outputs, all gradients, running state, and defining properties."""

from collections.abc import Callable
from functools import partial

import pytest
import torch
from torch import Tensor

from megatron_dmc.ops.residual import ResidualState, residual
from tests.support.oracle import INFINITY, Decisions, Draw, Shape, assert_equals_oracle, draw_pooling, relative_error

LENGTHS = (1, 2, 31, 32, 33, 63, 65, 97)


def tokens(shape: Shape, decisions: Decisions = "mixed", dtype: torch.dtype = torch.float64) -> dict[str, Tensor]:
    """key, value, weight; the weights span the range that clamped logits have."""
    drawn = draw_pooling(shape, decisions=decisions)
    omega = (5 * Draw(7).normal(shape.batch, shape.seq, shape.kv_heads)).clamp(-15, 8).exp()
    tensors = {"key": drawn["key"], "value": drawn["value"], "weight": drawn["alpha"] * omega}
    return {name: x.to(dtype) for name, x in tensors.items()}


def means(function: Callable[..., object]) -> Callable[..., tuple[Tensor, ...]]:
    """The means and the mass itself, which has a gradient where the slot is empty too."""

    def run(*x: Tensor) -> tuple[Tensor, ...]:
        (mean_key, mean_value, log_mass), _ = function(*x)  # type: ignore[misc]
        return mean_key, mean_value, log_mass.exp()

    return run


def both(**options: object) -> tuple[Callable[..., tuple[Tensor, ...]], Callable[..., tuple[Tensor, ...]]]:
    return means(partial(residual, **options)), means(partial(residual, backend="naive", **options))  # type: ignore[arg-type]


@pytest.mark.parametrize("decisions", ["soft", "hard", "mixed", "none", "all"])
@pytest.mark.parametrize("shape", [Shape(2, seq, 2, 2, 8) for seq in LENGTHS], ids=str)
def test_equals_the_oracle(shape: Shape, decisions: Decisions) -> None:
    assert_equals_oracle(*both(), tokens(shape, decisions), 1e-11, floor=1.0)
    # The form of a GPU, too, which knows documents.
    starts = torch.zeros(shape.batch, shape.seq, dtype=torch.bool)
    assert_equals_oracle(both(document_starts=starts)[0], both()[1], tokens(shape, decisions), 1e-11, floor=1.0)


@pytest.mark.parametrize("shape", [Shape(2, seq, 2, 2, 8) for seq in (1, 33, 64, 65)], ids=str)
def test_a_state_that_is_carried_equals_the_oracle(shape: Shape) -> None:
    """From the sums before the first token to those after the last, with gradients through both."""
    draw, inputs = Draw(5), tokens(shape)
    for name in ("key_sum", "value_sum"):
        inputs[name] = draw.normal(shape.batch, shape.kv_heads, shape.head_dim)
    inputs["mass"] = draw.uniform(shape.batch, shape.kv_heads) + 0.1

    def carried(*x: Tensor, backend: str) -> tuple[Tensor, ...]:
        after_each, last = residual(*x[:3], initial_state=ResidualState(*x[3:]), backend=backend)
        return *after_each, *last

    assert_equals_oracle(partial(carried, backend="auto"), partial(carried, backend="naive"), inputs, 1e-11)


def test_documents_begin_anew() -> None:
    inputs = tokens(Shape(2, 65, 2, 2, 8), "all")
    starts = torch.zeros(2, 65, dtype=torch.bool)
    starts[0, [1, 31, 32, 33]] = True
    starts[1, 64] = True
    assert_equals_oracle(*both(document_starts=starts), inputs, 1e-11, floor=1.0)
    (mean_key, _, log_mass), _ = residual(*inputs.values(), document_starts=starts)
    alone, _ = residual(*(x[:1, 33:] for x in inputs.values()))
    torch.testing.assert_close(mean_key[:1, 33:], alone.mean_key)
    torch.testing.assert_close(log_mass[:1, 33:], alone.log_mass)


def test_light_documents_keep_their_digits_after_heavy_ones() -> None:
    """A difference of running sums would lose all of a light document's."""
    inputs = tokens(Shape(1, 128, 1, 1, 8), "all", torch.float32)
    inputs["weight"][:, :100], inputs["weight"][:, 100:] = 3000.0, 1e-6
    starts = torch.zeros(1, 128, dtype=torch.bool)
    starts[:, 100] = True
    fast, _ = residual(*inputs.values(), document_starts=starts)
    alone, _ = residual(*(x[:, 100:].double() for x in inputs.values()))
    assert relative_error(fast.mean_key[:, 101:], alone.mean_key[:, 1:]) < 1e-6


@pytest.mark.parametrize("cut", [1, 20, 32, 64])
def test_two_chunks_are_the_whole(cut: int) -> None:
    inputs = tokens(Shape(2, 65, 2, 2, 8))
    whole, last = residual(*inputs.values())
    first, state = residual(*(x[:, :cut] for x in inputs.values()))
    second, end = residual(*(x[:, cut:] for x in inputs.values()), initial_state=state)
    for parts, expected in zip(zip(first, second, strict=True), whole, strict=True):
        torch.testing.assert_close(torch.cat(parts, dim=1), expected)
    for got, wanted in zip(end, last, strict=True):
        torch.testing.assert_close(got, wanted)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=["float32", "bfloat16"])
def test_lower_precision_stays_near_the_oracle(dtype: torch.dtype) -> None:
    inputs = tokens(Shape(2, 65, 2, 2, 8), dtype=dtype)
    inputs["weight"] = inputs["weight"].float()
    assert_equals_oracle(*both(), inputs, {torch.float32: 1e-5, torch.bfloat16: 3e-2}[dtype], floor=1.0)


def test_bfloat16_keeps_float32_sums() -> None:
    """4095 equal tokens in bf16 sums would stop growing at a mass of 256; the mean must stay the mean."""
    key = torch.linspace(-1, 1, 4096).reshape(1, -1, 1, 1).expand(-1, -1, -1, 2).bfloat16()
    (mean_key, _, log_mass), _ = residual(key, key, torch.ones(1, 4096, 1))
    assert abs(mean_key[0, -1, 0, 0].float()) < 1e-3
    assert mean_key.dtype == torch.bfloat16 and log_mass.dtype == torch.float32
    torch.testing.assert_close(log_mass[0, -1, 0].exp(), torch.tensor(4095.0))


@pytest.mark.parametrize("least", [0.0, 1e-45, 1e-38, 1e-30])
def test_nothing_is_infinite_where_next_to_nothing_was_absorbed(least: float) -> None:
    inputs = tokens(Shape(1, 40, 1, 1, 4), "all", torch.float32)
    inputs["weight"][:, :20] = least
    leaves = [x.requires_grad_() for x in inputs.values()]
    (mean_key, mean_value, log_mass), _ = residual(*leaves)
    if least == 0:
        assert not mean_key[:, :20].any() and not mean_value[:, :20].any()
        assert (log_mass[:, :20] == -INFINITY).all()
    outputs = mean_key, mean_value, log_mass
    for x in torch.autograd.grad(outputs, leaves, [torch.full_like(x, 1e-3) for x in outputs]):
        assert x.isfinite().all()
    assert mean_key.isfinite().all() and mean_value.isfinite().all()


def test_autocast_changes_nothing() -> None:
    def run(autocast: bool) -> list[Tensor]:
        leaves = [x.requires_grad_() for x in tokens(Shape(2, 65, 2, 2, 8), dtype=torch.float32).values()]
        with torch.autocast("cpu", torch.bfloat16, enabled=autocast):
            outputs = means(residual)(*leaves)
        return [*outputs, *torch.autograd.grad(sum(x.square().sum() for x in outputs), leaves)]  # type: ignore[union-attr]

    assert all(torch.equal(x, y) for x, y in zip(run(True), run(False), strict=True))


def test_shapes_are_checked() -> None:
    x = torch.zeros(1, 3, 2, 4)
    with pytest.raises(
        ValueError, match=r"weight \[b, s, kv_heads\]; got key \(1, 3, 2, 4\), value .*, weight \(1, 3, 1\)"
    ):
        residual(x, x, torch.zeros(1, 3, 1))
