"""The slot that the next token may still be merged into: unrotated, because merging comes before rotary embedding."""

import torch
from torch import Tensor

from megatron_dmc.ops.pooling import PoolState, pool


class RunningSums:
    """N_k, N_v and z of the exact scan: two vectors per (sequence, KV head), whatever the slot's length.

    A row without tokens holds N = 0, z = 1, so that nothing divides by zero.
    """

    def __init__(self, key: Tensor):
        """An empty slot for each row of key [batch, seq, kv_heads, head_dim]."""
        batch, _, kv_heads, head_dim = key.shape
        sums = torch.zeros(
            2, batch, kv_heads, head_dim, dtype=torch.promote_types(key.dtype, torch.float32), device=key.device
        )
        self.state = PoolState(sums[0], sums[1], sums.new_ones(batch, kv_heads))

    def pooled(self) -> tuple[Tensor, Tensor]:
        """The open slot's key and value, [batch, kv_heads, head_dim] in float32 or wider."""
        weight = self.state.weight[..., None]
        return self.state.key_sum / weight, self.state.value_sum / weight

    def step(self, key: Tensor, value: Tensor, alpha: Tensor, omega: Tensor) -> None:
        """One token per row. key, value [batch, kv_heads, head_dim]; alpha (bool), omega [batch, kv_heads]."""
        keep, omega = (x.to(self.state.weight.dtype) for x in (alpha, omega))
        self.state = PoolState(
            keep[..., None] * self.state.key_sum + omega[..., None] * key,
            keep[..., None] * self.state.value_sum + omega[..., None] * value,
            keep * self.state.weight + omega,
        )

    def chunk(self, key: Tensor, value: Tensor, alpha: Tensor, omega: Tensor, lengths: Tensor) -> tuple[Tensor, Tensor]:
        """Many tokens, lengths [batch] of them real; returns each one's pooled key and value, as key and value."""
        real = (torch.arange(key.shape[1], device=key.device) < lengths[:, None])[..., None]
        # A token past its row's length is merged with weight 0, which changes no sum.
        pooled_key, pooled_value, state = pool(
            key, value, (alpha | ~real).to(omega.dtype), omega * real, initial_state=self.state, return_final_state=True
        )
        # A copy, because it may be a view of a temporary as long as the chunk.
        self.state = PoolState(*(x.clone() for x in state))
        return pooled_key, pooled_value

    def select(self, sequences: Tensor) -> None:
        self.state = PoolState(*(x[sequences] for x in self.state))

    def tensors(self) -> list[Tensor]:
        return list(self.state)


class RecentTokens:
    """The last ``window_size`` tokens, for pooling truncated to them. Tokens of earlier slots have omega 0."""

    def __init__(self, key: Tensor, window_size: int):
        batch, _, kv_heads, head_dim = key.shape
        self.window_size = window_size
        self.key = key.new_zeros(batch, window_size, kv_heads, head_dim)
        self.value = torch.zeros_like(self.key)
        self.omega = torch.zeros(
            batch, window_size, kv_heads, dtype=torch.promote_types(key.dtype, torch.float32), device=key.device
        )

    def pooled(self) -> tuple[Tensor, Tensor]:
        """The open slot's key and value, [batch, kv_heads, head_dim] in float32 or wider; NaN without tokens."""
        weight = self.omega.sum(1)[..., None]
        return (self.omega[..., None] * self.key).sum(1) / weight, (self.omega[..., None] * self.value).sum(1) / weight

    def step(self, key: Tensor, value: Tensor, alpha: Tensor, omega: Tensor) -> None:
        """One token per row. key, value [batch, kv_heads, head_dim]; alpha (bool), omega [batch, kv_heads]."""
        kept = self.omega[:, 1:] * alpha[:, None]
        self.omega = torch.cat([kept, omega[:, None].to(kept.dtype)], dim=1)
        self.key = torch.cat([self.key[:, 1:], key[:, None]], dim=1)
        self.value = torch.cat([self.value[:, 1:], value[:, None]], dim=1)

    def chunk(self, key: Tensor, value: Tensor, alpha: Tensor, omega: Tensor, lengths: Tensor) -> tuple[Tensor, Tensor]:
        """Many tokens, lengths [batch] of them real; returns each one's pooled key and value, as key and value."""
        key, value = torch.cat([self.key, key], dim=1), torch.cat([self.value, value], dim=1)
        alpha = torch.cat([torch.ones_like(self.omega, dtype=torch.bool), alpha], dim=1)
        omega = torch.cat([self.omega, omega.to(self.omega.dtype)], dim=1)
        pooled_key, pooled_value = pool(key, value, alpha.to(omega.dtype), omega, window_size=self.window_size)

        recent = lengths[:, None] + torch.arange(self.window_size, device=lengths.device)
        row = torch.arange(len(lengths), device=lengths.device)[:, None]
        slot = (~alpha).cumsum(1)
        in_last_slot = slot[row, recent] == slot[row, recent[:, -1:]]
        self.key, self.value, self.omega = key[row, recent], value[row, recent], omega[row, recent] * in_last_slot
        return pooled_key[:, self.window_size :], pooled_value[:, self.window_size :]

    def select(self, sequences: Tensor) -> None:
        self.key, self.value, self.omega = self.key[sequences], self.value[sequences], self.omega[sequences]

    def tensors(self) -> list[Tensor]:
        return [self.key, self.value, self.omega]
