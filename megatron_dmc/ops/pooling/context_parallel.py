"""Pooling of a sequence that is cut over a context-parallel group: ranks exchange a scan's carry, not tokens."""

from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor

from megatron_dmc.ops.context_parallel import chunk_numbers, gather_sequence_with_gradient
from megatron_dmc.ops.matrix_product import matrix_product
from megatron_dmc.ops.pooling import PoolState, pool
from megatron_dmc.ops.pooling.scan import linear_scan
from megatron_dmc.ops.pooling.torch import rows, unrows


def context_parallel_pool(
    key: Tensor,
    value: Tensor,
    alpha: Tensor,
    omega: Tensor,
    *,
    group: dist.ProcessGroup,
    window_size: int | None = None,
    document_starts: Tensor | None = None,
) -> tuple[Tensor, Tensor]:
    """As ``pool``, on this rank's two chunks of a sequence (see ops/context_parallel.py).

    A chunk maps the open slot before it to the open slot after it: state -> (product of its alphas) * state + its own sums.
    The maps of all chunks are gathered, 2 head_dim + 2 numbers per head, and each chunk is pooled from the state before it.

    Args:
        key, value: [batch, seq / ranks, kv_heads, head_dim].
        alpha, omega, document_starts: as in ``pool``, this rank's tokens.
        window_size: must be None: a truncated scan has no carry.

    Raises:
        ValueError: a window_size, or a length that is not two chunks.
    """
    if window_size is not None:
        raise ValueError(f"window_size must be None under context parallelism, got {window_size}")
    if key.shape[1] % 2:
        raise ValueError(f"a context-parallel rank holds two chunks of one length, got {key.shape[1]} tokens")
    if document_starts is not None:
        alpha = alpha.masked_fill(document_starts[..., None], 0)
    chunks = [x.unflatten(1, (2, -1)).flatten(0, 1) for x in (key, value, alpha, omega)]  # [batch * 2, chunk, ...]
    batch, kv_heads, head_dim = key.shape[0], *key.shape[2:]
    # [batch, 2, kv_heads, 2 * head_dim + 2]
    left = torch.cat(_ChunkEnd.apply(*chunks), dim=-1).unflatten(0, (batch, 2))
    maps = gather_sequence_with_gradient(left, group)
    state = maps.new_zeros(batch, kv_heads, 2 * head_dim + 1)
    states = [state]
    for end, product in zip(maps[..., :-1].unbind(1), maps[..., -1:].unbind(1), strict=True):
        state = product * state + end
        states.append(state)
    before = torch.stack([states[n] for n in chunk_numbers(group)], dim=1).flatten(0, 1)
    key_sum, value_sum, weight = before.split([head_dim, head_dim, 1], dim=-1)
    pooled = pool(*chunks, initial_state=PoolState(key_sum, value_sum, weight[..., 0]))
    pooled_key, pooled_value = (x.unflatten(0, (batch, 2)).flatten(1, 2) for x in pooled)
    return pooled_key, pooled_value


class _ChunkEnd(torch.autograd.Function):
    """A chunk's own sums (N_k, N_v, z), [batch, kv_heads, 2 * head_dim + 1], and the product of its alphas, [..., 1].

    N = sum_t S_t omega_t x_t with S_t the product of the alphas after t. Backward, with u_t = dN . x_t + dz,
    dx_t = S_t omega_t dN,  domega_t = S_t u_t,  dalpha_t = S_t y_{t-1},  y_t = alpha_t y_{t-1} + omega_t u_t,
    where y_{-1} is the product's gradient.
    """

    @staticmethod
    def forward(ctx: Any, key: Tensor, value: Tensor, alpha: Tensor, omega: Tensor) -> tuple[Tensor, Tensor]:
        wide = torch.promote_types(key.dtype, torch.float32)
        alpha_rows = rows(alpha).to(wide)
        # S_{-1}, ..., S_{seq - 1}
        after = torch.cat([alpha_rows, torch.ones_like(alpha_rows[:, :1])], dim=1).flip(1).cumprod(1).flip(1)
        weight = after[:, 1:] * rows(omega).to(wide)
        sums = [matrix_product(weight[:, None], rows(x).to(wide))[:, 0] for x in (key, value)]
        end = torch.cat([*sums, weight.sum(1, keepdim=True)], dim=-1)
        ctx.save_for_backward(key, value, alpha, omega)
        heads = key.shape[2]
        return end.unflatten(0, (-1, heads)), after[:, :1].unflatten(0, (-1, heads))

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor, ...]:
        key, value, alpha, omega = ctx.saved_tensors
        grad_end, grad_product = (x.flatten(0, 1) for x in grads)
        alpha_rows, omega_rows = (rows(x).to(grad_end.dtype) for x in (alpha, omega))
        after = torch.cat([alpha_rows[:, 1:], torch.ones_like(alpha_rows[:, :1])], dim=1).flip(1).cumprod(1).flip(1)
        d_sums = grad_end[:, :-1].chunk(2, dim=-1)
        inner = grad_end[:, -1:] + sum(
            matrix_product(rows(x).to(grad_end.dtype), d[..., None])[..., 0]
            for x, d in zip((key, value), d_sums, strict=True)
        )
        along = linear_scan(alpha_rows, (omega_rows * inner)[..., None], grad_product)[..., 0]
        before = torch.cat([grad_product, along[:, :-1]], dim=1)
        heads = key.shape[2]
        d_key, d_value = (unrows(((after * omega_rows)[..., None] * d[:, None]).to(key.dtype), heads) for d in d_sums)
        d_alpha, d_omega = unrows(after * before, heads), unrows(after * inner, heads)
        return d_key, d_value, d_alpha.to(alpha.dtype), d_omega.to(omega.dtype)
