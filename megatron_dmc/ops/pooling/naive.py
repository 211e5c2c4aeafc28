"""Pooling token by token: the oracle."""

import torch
from torch import Tensor

from megatron_dmc.ops.pooling.state import PoolState


def pool(
    key: Tensor,
    value: Tensor,
    alpha: Tensor,
    omega: Tensor,
    window_size: int | None = None,
    initial_state: PoolState | None = None,
) -> tuple[Tensor, Tensor, PoolState | None]:
    """N_t = alpha_t N_{t-1} + omega_t x_t;  z_t = alpha_t z_{t-1} + omega_t;  x~_t = N_t / z_t.

    alpha is 0 where a slot has to start. With a ``window_size`` the sums run over the last so many tokens, and there is no
    state. Returns pooled key and value, [batch, seq, kv_heads, head_dim], and the state after the last token.
    """
    tokens = torch.cat([key, value], dim=-1)
    window = window_size or key.shape[1]
    pooled = []
    for t in range(key.shape[1]):
        if initial_state is None:
            numerator, weight = torch.zeros_like(tokens[:, 0]), torch.zeros_like(omega[:, 0])
        else:
            numerator, weight = torch.cat(initial_state[:2], dim=-1), initial_state.weight
        for j in range(max(0, t - window + 1), t + 1):
            numerator = alpha[:, j, :, None] * numerator + omega[:, j, :, None] * tokens[:, j]
            weight = alpha[:, j] * weight + omega[:, j]
        pooled.append(numerator / weight[..., None])
    pooled_key, pooled_value = torch.stack(pooled, dim=1).split(key.shape[-1], dim=-1)
    if window_size:
        return pooled_key, pooled_value, None
    key_sum, value_sum = numerator.split(key.shape[-1], dim=-1)
    return pooled_key, pooled_value, PoolState(key_sum, value_sum, weight)
