"""The residual slot by parallel sums, with their adjoint as its backward pass."""

from typing import Any, NamedTuple

import torch
from torch import Tensor

from megatron_dmc.ops.pooling.scan import linear_scan
from megatron_dmc.ops.residual.types import Residual, ResidualState

# A smaller mass counts as this one where means are divided by it: its share of attention is nothing, and its inverse must
# stay finite.
LEAST_MASS = 2.0**-100


def residual(
    key: Tensor, value: Tensor, weight: Tensor, starts: Tensor, initial_state: ResidualState | None = None
) -> tuple[Residual, ResidualState]:
    """As the public one; ``starts`` are all of them."""
    *after_each, key_sum, value_sum, mass = _Residual.apply(key, value, weight, starts, *(initial_state or (None,) * 3))
    return Residual(*after_each), ResidualState(key_sum, value_sum, mass)


def residual_forward(
    key: Tensor, value: Tensor, weight: Tensor, starts: Tensor, initial: ResidualState | None = None
) -> tuple[Residual, ResidualState]:
    """residual without a gradient."""
    wide = torch.promote_types(key.dtype, torch.float32)
    weight = weight.to(wide).masked_fill(starts[..., None], 0)
    decay = (~starts).to(wide)
    key_before, value_before, mass_before = initial or (None, None, None)
    mass = linear_scan(decay, weight, mass_before)
    inverse = (1 / mass.clamp(min=LEAST_MASS))[..., None]
    means, last = [], []
    for x, before in ((key, key_before), (value, value_before)):
        sums = linear_scan(decay, (weight[..., None] * x).flatten(2), None if before is None else before.flatten(1))
        sums = sums.view(x.shape)
        last.append(sums[:, -1].clone())
        means.append(sums.mul_(inverse).to(x.dtype))
    return Residual(means[0], means[1], mass.log()), ResidualState(last[0], last[1], mass[:, -1].clone())


class ResidualGradients(NamedTuple):
    """Of key, value, weight and the initial state, in their shapes; float32 or wider."""

    key: Tensor
    value: Tensor
    weight: Tensor
    initial: ResidualState


def residual_backward(
    grads: Residual,
    key: Tensor,
    value: Tensor,
    weight: Tensor,
    starts: Tensor,
    after_each: Residual,
    *,
    last: ResidualState | None = None,
) -> ResidualGradients:
    """The gradients.

    With A_j the sum of dK_t / N_t over t >= j of the same document, dk_j = weight_j A_j, and
    dweight_j = A_j . k_j + (the same for v) + sum over t >= j of (dlog N_t - dK_t . K_t - dV_t . V_t) / N_t.

    Args:
        grads: of ``after_each``, what residual_forward returned.
        last: gradients of the sums after the last token.
    """
    log_mass = after_each.log_mass
    wide = log_mass.dtype
    weight = weight.to(wide).masked_fill(starts[..., None], 0)
    decay = (~starts).to(wide)
    inverse = torch.exp(-log_mass).clamp(max=1 / LEAST_MASS).masked_fill(log_mass == float("-inf"), 0)
    key_last, value_last, d_mass_last = last or (None, None, None)
    d_mass = grads.log_mass.to(wide)
    d_weight: Tensor | None = None
    d_tokens, d_initial = [], []
    for grad, mean, x, d_last in (
        (grads.mean_key, after_each.mean_key, key, key_last),
        (grads.mean_value, after_each.mean_value, value, value_last),
    ):
        grad = grad.to(wide)
        d_mass = d_mass - (grad * mean).sum(-1)
        scaled = (grad * inverse[..., None]).flatten(2)
        along = linear_scan(decay, scaled, None if d_last is None else d_last.flatten(1), reverse=True).view(x.shape)
        d_initial.append(decay[:, 0, None, None] * along[:, 0])
        of_weight = (along * x).sum(-1)
        d_weight = of_weight if d_weight is None else d_weight.add_(of_weight)
        d_tokens.append(along.mul_(weight[..., None]))
    assert d_weight is not None
    along = linear_scan(decay, d_mass.mul_(inverse), d_mass_last, reverse=True)
    d_weight += along
    d_initial.append(decay[:, :1] * along[:, 0])
    # A start is not absorbed.
    d_weight.masked_fill_(starts[..., None], 0)
    return ResidualGradients(d_tokens[0], d_tokens[1], d_weight, ResidualState(*d_initial))


class _Residual(torch.autograd.Function):
    """Its first four arguments are residual's, then the initial state, one by one."""

    @staticmethod
    def forward(
        ctx: Any, key: Tensor, value: Tensor, weight: Tensor, starts: Tensor, *state: Tensor | None
    ) -> tuple[Tensor, ...]:
        initial = None if state[0] is None else ResidualState(*state)  # type: ignore[arg-type]
        after_each, last = residual_forward(key, value, weight, starts, initial)
        ctx.save_for_backward(key, value, weight, starts, *after_each)
        ctx.has_initial = initial is not None
        return *after_each, *last

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor | None, ...]:
        key, value, weight, starts, *after_each = ctx.saved_tensors
        found = residual_backward(
            Residual(*grads[:3]), key, value, weight, starts, Residual(*after_each), last=ResidualState(*grads[3:])
        )
        of_inputs = found.key.to(key.dtype), found.value.to(value.dtype), found.weight.to(weight.dtype)
        return *of_inputs, None, *(found.initial if ctx.has_initial else (None, None, None))
