"""Merging of keys and values into slots, before rotary embedding (paper, section 3.1)."""

from typing import Literal, NamedTuple, overload

import torch
from torch import Tensor

from megatron_dmc.ops.pooling import naive, parallel

__all__ = ["PoolState", "pool"]


class PoolState(NamedTuple):
    """The running sums of the open slot: N_k, N_v [batch, kv_heads, head_dim] and z [batch, kv_heads]; float32 or wider."""

    key_sum: Tensor
    value_sum: Tensor
    weight: Tensor


@overload
def pool(
    key: Tensor,
    value: Tensor,
    alpha: Tensor,
    omega: Tensor,
    *,
    window_size: int | None = None,
    document_starts: Tensor | None = None,
    initial_state: PoolState | None = None,
    return_final_state: Literal[False] = False,
    backend: str = "auto",
) -> tuple[Tensor, Tensor]: ...


@overload
def pool(
    key: Tensor,
    value: Tensor,
    alpha: Tensor,
    omega: Tensor,
    *,
    window_size: int | None = None,
    document_starts: Tensor | None = None,
    initial_state: PoolState | None = None,
    return_final_state: Literal[True],
    backend: str = "auto",
) -> tuple[Tensor, Tensor, PoolState]: ...


def pool(
    key: Tensor,
    value: Tensor,
    alpha: Tensor,
    omega: Tensor,
    *,
    window_size: int | None = None,
    document_starts: Tensor | None = None,
    initial_state: PoolState | None = None,
    return_final_state: bool = False,
    backend: str = "auto",
) -> tuple[Tensor, Tensor] | tuple[Tensor, Tensor, PoolState]:
    """Every token's slot as it stands when that token has entered it.

    N_t = alpha_t N_{t-1} + omega_t x_t,  z_t = alpha_t z_{t-1} + omega_t,  pooled x_t = N_t / z_t, accumulated in float32
    (float64 for float64 inputs), under autocast too. Exact for alpha 0 and 1; differentiable in all four.

    Args:
        key, value: [batch, seq, kv_heads, head_dim], before rotary embedding.
        alpha: [batch, seq, kv_heads] in [0, 1]; alpha[:, 0] is taken as 0 unless there is an initial_state.
        omega: [batch, seq, kv_heads], > 0.
        window_size: None for the exact scan; w sums over a slot's last w tokens only (the authors' code: 12).
        document_starts: bool [batch, seq], true at the first token of a document; alpha is taken as 0 there.
        initial_state: the open slot before the first token. Not with window_size.
        return_final_state: also return the open slot after the last token. Not with window_size.
        backend: "auto" or "torch"; "naive" is the oracle, one token at a time.

    Returns:
        pooled_key, pooled_value: as key and value; with return_final_state the PoolState too.

    Raises:
        ValueError: shapes do not fit, window_size < 1, a state together with window_size, an unknown backend.
    """
    if key.shape != value.shape or alpha.shape != key.shape[:3] or omega.shape != key.shape[:3]:
        raise ValueError(
            f"pool needs key and value [b, s, kv_heads, d], alpha and omega [b, s, kv_heads]; got key {tuple(key.shape)}, "
            f"value {tuple(value.shape)}, alpha {tuple(alpha.shape)}, omega {tuple(omega.shape)}"
        )
    if window_size is not None and (window_size < 1 or initial_state is not None or return_final_state):
        raise ValueError(f"window_size must be >= 1 and has no running state, got {window_size}")
    if backend not in ("auto", "torch", "naive"):
        raise ValueError(f"backend must be auto, torch or naive, got {backend!r}")
    if backend == "naive" and (initial_state is not None or return_final_state):
        raise ValueError("the naive backend has no running state")

    starts = torch.zeros(alpha.shape[:2], dtype=torch.bool, device=alpha.device)
    starts[:, 0] = initial_state is None
    if document_starts is not None:
        starts = starts | document_starts
    alpha = alpha.masked_fill(starts[..., None], 0)

    if backend == "naive":
        return naive.pool(key, value, alpha, omega, window_size)
    if window_size is not None:
        return parallel.pool_window(key, value, alpha, omega, window_size)
    initial = initial_weight = None
    if initial_state is not None:
        initial = torch.cat(initial_state[:2], dim=-1).flatten(0, 1)
        initial_weight = initial_state.weight.flatten()
    pooled_key, pooled_value, last, weight = parallel.Pool.apply(key, value, alpha, omega, initial, initial_weight)
    if not return_final_state:
        return pooled_key, pooled_value
    key_sum, value_sum = last.unflatten(0, (-1, key.shape[2])).chunk(2, dim=-1)
    return pooled_key, pooled_value, PoolState(key_sum, value_sum, weight.unflatten(0, (-1, key.shape[2])))
