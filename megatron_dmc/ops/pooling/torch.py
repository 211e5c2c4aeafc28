"""Pooling by a parallel scan, with the adjoint recurrence as its backward pass."""

from typing import Any

import torch
from torch import Tensor

from megatron_dmc.ops.pooling.scan import linear_scan
from megatron_dmc.ops.pooling.state import PoolState


def pool(
    key: Tensor,
    value: Tensor,
    alpha: Tensor,
    omega: Tensor,
    window_size: int | None = None,
    initial_state: PoolState | None = None,
) -> tuple[Tensor, Tensor, PoolState | None]:
    """Pooled key and value, and the open slot after the last token (None with a ``window_size``).

    Args:
        key, value, omega, window_size, initial_state: as the public pool's.
        alpha: 0 where a slot has to start.
    """
    if window_size is not None:
        return *pool_window(key, value, alpha, omega, window_size), None
    initial = initial_weight = None
    if initial_state is not None:
        initial = torch.cat(initial_state[:2], dim=-1).flatten(0, 1)
        initial_weight = initial_state.weight.flatten()
    pooled_key, pooled_value, last, weight = Pool.apply(key, value, alpha, omega, initial, initial_weight)
    key_sum, value_sum = last.unflatten(0, (-1, key.shape[2])).chunk(2, dim=-1)
    return pooled_key, pooled_value, PoolState(key_sum, value_sum, weight.unflatten(0, (-1, key.shape[2])))


def rows(x: Tensor) -> Tensor:
    """[batch, seq, kv_heads, ...] -> [batch * kv_heads, seq, ...]"""
    return x.transpose(1, 2).flatten(0, 1)


def unrows(x: Tensor, kv_heads: int) -> Tensor:
    """The inverse of rows."""
    return x.unflatten(0, (-1, kv_heads)).transpose(1, 2)


class Pool(torch.autograd.Function):
    """The means themselves are a recurrence: x~_t = (1 - r_t) x~_{t-1} + r_t x_t with r_t = omega_t / z_t.

    So the slots' weights z are scanned first, one channel, and then the means. Only weights are divided by weights, and
    where alpha is 0 (r = 1) the result is x_t to the last bit. Gradients run through the same recurrence backwards: with
    g_t the gradient of x~_t and h_t = z_t dL/dN_t,
    h_t = g_t + (1 - r_{t+1}) h_{t+1},  dx_t = r_t h_t,  gz_t = -(g_t . x~_t) / z_t + alpha_{t+1} gz_{t+1},
    domega_t = h_t . x_t / z_t + gz_t,  dalpha_t = z_{t-1} (h_t . x~_{t-1} / z_t + gz_t).
    """

    @staticmethod
    def forward(
        ctx: Any,
        key: Tensor,
        value: Tensor,
        alpha: Tensor,
        omega: Tensor,
        initial: Tensor | None,
        initial_weight: Tensor | None,
    ) -> tuple[Tensor, Tensor, Tensor, Tensor]:
        """Pooled key and value, the last N [rows, 2 * head_dim] and the last z [rows].

        ``initial`` is N_{-1} and ``initial_weight`` z_{-1}, shaped as the last N and z; rows are batch * kv_heads.
        """
        wide = torch.promote_types(key.dtype, torch.float32)
        alpha_rows, omega_rows = rows(alpha).to(wide), rows(omega).to(wide)
        before = None if initial_weight is None else initial_weight[:, None]
        weight = linear_scan(alpha_rows, omega_rows[..., None], before)[..., 0]
        share = omega_rows / weight
        previous_weight = torch.cat(
            [torch.zeros_like(weight[:, :1]) if before is None else before, weight[:, :-1]], dim=1
        )
        keep = alpha_rows * previous_weight / weight
        inputs = torch.cat([rows(key) * share[..., None], rows(value) * share[..., None]], dim=-1)
        mean = None if initial is None or before is None else torch.where(before > 0, initial / before, 0)
        pooled = linear_scan(keep, inputs, mean)
        last = pooled[:, -1] * weight[:, -1:]
        pooled = unrows(pooled.to(key.dtype), key.shape[2])
        ctx.save_for_backward(key, value, alpha_rows, share, keep, weight, previous_weight, pooled, mean)
        ctx.dtypes = alpha.dtype, omega.dtype
        pooled_key, pooled_value = pooled.split(key.shape[-1], dim=-1)
        return pooled_key, pooled_value, last, weight[:, -1].clone()

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor | None, ...]:
        grad_key, grad_value, grad_last, grad_last_weight = grads
        key, value, alpha, share, keep, weight, previous_weight, pooled, mean = ctx.saved_tensors
        kv_heads, head_dim = key.shape[2:]
        pooled = rows(pooled)
        grad_pooled = torch.cat([rows(grad_key), rows(grad_value)], dim=-1).to(weight.dtype)
        grad_weight = -(grad_pooled * pooled).sum(-1) / weight
        grad_weight[:, -1] += grad_last_weight
        grad_pooled[:, -1] += weight[:, -1:] * grad_last
        h = linear_scan(keep, grad_pooled, reverse=True)
        grad_weight = linear_scan(alpha, grad_weight[..., None], reverse=True)[..., 0]

        before = torch.zeros_like(h[:, 0]) if mean is None else mean
        from_previous = torch.cat([(h[:, :1] * before[:, None]).sum(-1), (h[:, 1:] * pooled[:, :-1]).sum(-1)], dim=1)
        grad_alpha = previous_weight * (from_previous / weight + grad_weight)
        h_key, h_value = h.split(head_dim, dim=-1)
        grad_omega = ((h_key * rows(key)).sum(-1) + (h_value * rows(value)).sum(-1)) / weight + grad_weight
        alpha_dtype, omega_dtype = ctx.dtypes
        return (
            unrows((share[..., None] * h_key).to(key.dtype), kv_heads),
            unrows((share[..., None] * h_value).to(value.dtype), kv_heads),
            unrows(grad_alpha.to(alpha_dtype), kv_heads),
            unrows(grad_omega.to(omega_dtype), kv_heads),
            None if mean is None else (alpha[:, :1] / weight[:, :1]) * h[:, 0],
            None if mean is None else alpha[:, 0] * grad_weight[:, 0],
        )


def pool_window(key: Tensor, value: Tensor, alpha: Tensor, omega: Tensor, window_size: int) -> tuple[Tensor, Tensor]:
    """The scan truncated to a slot's last ``window_size`` tokens, as the authors' released code has it.

    A sum over the window's offsets (not over tokens). It serves their checkpoints only, so autograd makes its backward pass.
    """
    wide = torch.promote_types(key.dtype, torch.float32)
    tokens = torch.cat([key, value], dim=-1).to(wide)
    alpha, omega = alpha.to(wide), omega.to(wide)
    decay = torch.ones_like(alpha)
    weights = [omega]
    for offset in range(1, min(window_size, key.shape[1])):
        decay = decay * _delayed(alpha, offset - 1)
        weights.append(decay * _delayed(omega, offset))
    slot_weight = torch.stack(weights).sum(0)
    pooled = torch.zeros_like(tokens)
    for offset, weight in enumerate(weights):
        pooled = pooled + (weight / slot_weight)[..., None] * _delayed(tokens, offset)
    pooled_key, pooled_value = pooled.to(key.dtype).split(key.shape[-1], dim=-1)
    return pooled_key, pooled_value


def _delayed(x: Tensor, offset: int) -> Tensor:
    """x[:, t - offset], zero before the first token."""
    return torch.cat([torch.zeros_like(x[:, :offset]), x[:, : x.shape[1] - offset]], dim=1)
