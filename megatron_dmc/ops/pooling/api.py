"""Pooling: its arguments are checked and a slot is opened where one must begin; then an implementation runs."""

from typing import Literal, overload

import torch
from torch import Tensor

from megatron_dmc.ops.backend import choose
from megatron_dmc.ops.pooling import naive
from megatron_dmc.ops.pooling.state import PoolState
from megatron_dmc.ops.pooling.torch import pool as torch_pool


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
    """Every token's slot as it is after that token has entered it.

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
        backend: "auto", "torch", or "naive", the oracle, one token at a time.

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
    implementation = choose(backend, {"torch": torch_pool, "naive": naive.pool})

    starts = torch.zeros(alpha.shape[:2], dtype=torch.bool, device=alpha.device)
    starts[:, 0] = initial_state is None
    if document_starts is not None:
        starts = starts | document_starts
    alpha = alpha.masked_fill(starts[..., None], 0)

    pooled_key, pooled_value, state = implementation(key, value, alpha, omega, window_size, initial_state)
    if not return_final_state:
        return pooled_key, pooled_value
    assert state is not None
    return pooled_key, pooled_value, state
