"""The residual slot by parallel sums, with their adjoint as its backward pass."""

from typing import Any, NamedTuple

import torch
from torch import Tensor

from megatron_dmc.ops.pooling.scan import linear_scan
from megatron_dmc.ops.residual.types import Residual, ResidualState

# A smaller mass counts as this one where means are divided by it: its share of attention is nothing, and its inverse must
# stay finite.
LEAST_MASS = 2.0**-100


# Tokens that are added up one after another, all blocks at once.
BLOCK = 32


def residual(
    key: Tensor, value: Tensor, weight: Tensor, starts: Tensor | None, initial_state: ResidualState | None = None
) -> tuple[Residual, ResidualState]:
    """As the public one; ``starts`` are all of them. None: rows of one document each."""
    *after_each, key_sum, value_sum, mass = _Residual.apply(key, value, weight, starts, *(initial_state or (None,) * 3))
    return Residual(*after_each), ResidualState(key_sum, value_sum, mass)


def residual_forward(
    key: Tensor, value: Tensor, weight: Tensor, starts: Tensor | None, initial: ResidualState | None = None
) -> tuple[Residual, ResidualState]:
    """residual without a gradient."""
    wide = torch.promote_types(key.dtype, torch.float32)
    weight = _absorbed(weight.to(wide), starts, initial is not None)
    key_before, value_before, mass_before = initial or (None, None, None)
    mass = _running_sums(weight.clone(), starts, mass_before)
    inverse = (1 / mass.clamp(min=LEAST_MASS))[..., None]
    means, last = [], []
    for x, before in ((key, key_before), (value, value_before)):
        sums = _running_sums((weight[..., None] * x).flatten(2), starts, None if before is None else before.flatten(1))
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
    starts: Tensor | None,
    after_each: Residual,
    *,
    begun: bool = False,
    last: ResidualState | None = None,
) -> ResidualGradients:
    """The gradients.

    With A_j the sum of dK_t / N_t over t >= j of the same document, dk_j = weight_j A_j, and
    dweight_j = A_j . k_j + (the same for v) + sum over t >= j of (dlog N_t - dK_t . K_t - dV_t . V_t) / N_t.

    Args:
        grads: of ``after_each``, what residual_forward returned; those of the means are overwritten.
        begun: there was an initial state.
        last: gradients of the sums after the last token.
    """
    log_mass = after_each.log_mass
    wide = log_mass.dtype
    weight = _absorbed(weight.to(wide), starts, begun)
    inverse = torch.exp(-log_mass).clamp(max=1 / LEAST_MASS).masked_fill(log_mass == float("-inf"), 0)
    key_last, value_last, d_mass_last = last or (None, None, None)
    d_mass = grads.log_mass.to(wide)
    d_weight: Tensor | None = None
    d_tokens, d_initial = [], []
    # For products that are summed at once. On a CPU fresh memory costs more than what is computed in it.
    product = torch.empty_like(key, dtype=wide, memory_format=torch.contiguous_format)
    for grad, mean, x, d_last in (
        (grads.mean_key, after_each.mean_key, key, key_last),
        (grads.mean_value, after_each.mean_value, value, value_last),
    ):
        grad = grad.to(wide)
        d_mass = d_mass - torch.mul(grad, mean, out=product).sum(-1)
        scaled = grad.mul_(inverse[..., None]).flatten(2)
        d_last = None if d_last is None else d_last.flatten(1)
        along = _running_sums(scaled, starts, d_last, reverse=True).view(x.shape)
        d_initial.append(_absorbed(along[:, :1], None if starts is None else starts[:, :1], begun)[:, 0].clone())
        of_weight = torch.mul(along, x, out=product).sum(-1)
        d_weight = of_weight if d_weight is None else d_weight.add_(of_weight)
        d_tokens.append(along.mul_(weight[..., None]))
    assert d_weight is not None
    along = _running_sums(d_mass.mul_(inverse), starts, d_mass_last, reverse=True)
    d_weight += along
    d_initial.append(_absorbed(along[:, :1], None if starts is None else starts[:, :1], begun)[:, 0].clone())
    d_weight = _absorbed(d_weight, starts, begun)
    return ResidualGradients(d_tokens[0], d_tokens[1], d_weight, ResidualState(*d_initial))


def _absorbed(x: Tensor, starts: Tensor | None, begun: bool) -> Tensor:
    """x [batch, seq, ...], 0 at the first token of a document, which is not absorbed."""
    if starts is not None:
        return x.masked_fill(starts.view(*starts.shape, *(1,) * (x.dim() - 2)), 0)
    if begun:
        return x
    return torch.cat([torch.zeros_like(x[:, :1]), x[:, 1:]], dim=1)


def _running_sums(x: Tensor, starts: Tensor | None, initial: Tensor | None, *, reverse: bool = False) -> Tensor:
    """y_t = x_t + y_{t-1}, or 0 + x_t at a start; in reverse y_t = x_t + y_{t+1}, or x_t before a start. May overwrite x.

    Args:
        x: [batch, seq, channels].
        initial: [batch, channels], what comes before the first token, in reverse after the last; None for zero.
    """
    if starts is None and x.device.type == "cpu":
        _add_up(x, reverse)
        return x if initial is None else x.add_(initial[:, None])
    decay = torch.ones_like(x[..., 0]) if starts is None else (~starts).to(x.dtype)
    return linear_scan(decay, x, initial, reverse=reverse)


def _add_up(x: Tensor, reverse: bool) -> None:
    """Running sums in place: a CPU spends more on fresh memory than on sums."""
    whole = x.shape[1] - x.shape[1] % BLOCK
    blocks, rest = x[:, :whole].unflatten(1, (-1, BLOCK)), x[:, whole:]
    if reverse:
        rest.copy_(_suffix_sums(rest))
        for i in reversed(range(BLOCK - 1)):
            blocks[:, :, i] += blocks[:, :, i + 1]
        after = _suffix_sums(torch.cat([blocks[:, 1:, 0], rest[:, :1]], dim=1))
        blocks[:, : after.shape[1]] += after[:, :, None]
        return
    rest.copy_(rest.cumsum(1))
    for i in range(1, BLOCK):
        blocks[:, :, i] += blocks[:, :, i - 1]
    before = blocks[:, :, -1].cumsum(1)
    blocks[:, 1:] += before[:, :-1, None]
    if whole:
        rest += before[:, -1:]


def _suffix_sums(x: Tensor) -> Tensor:
    return x.flip(1).cumsum(1).flip(1)


class _Residual(torch.autograd.Function):
    """Its first four arguments are residual's, then the initial state, one by one."""

    @staticmethod
    def forward(
        ctx: Any, key: Tensor, value: Tensor, weight: Tensor, starts: Tensor | None, *state: Tensor | None
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
            Residual(grads[0].clone(), grads[1].clone(), grads[2]),
            *(key, value, weight, starts),
            Residual(*after_each),
            begun=ctx.has_initial,
            last=ResidualState(*grads[3:]),
        )
        of_inputs = found.key.to(key.dtype), found.value.to(value.dtype), found.weight.to(weight.dtype)
        return *of_inputs, None, *(found.initial if ctx.has_initial else (None, None, None))
