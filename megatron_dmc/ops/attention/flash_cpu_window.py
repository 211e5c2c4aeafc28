"""Causal attention to the last few tokens on torch's flash kernel for a CPU, which knows no window.

Blocks of queries go to the kernel as rows of their own, each with the keys that it can see, and one small band mask serves
all rows. Only the first block has no keys before its own.
"""

from collections.abc import Iterator
from dataclasses import dataclass

import torch
from torch import Tensor

from megatron_dmc.ops.attention.flash_cpu import kernel_backward, kernel_forward
from megatron_dmc.ops.attention.types import Attended, BiasedKeys, Gradients, KernelSettings

# Queries in a block, at least. The kernel is slow with shorter blocks.
SHORTEST_BLOCK = 32

# Tokens in one call of the kernel. It bounds the copies that a call needs.
GROUP = 1024

# The mask of a key that no query of a row sees. No score comes near it; an infinity would leave a row without keys.
UNSEEN = -1e30


def cpu_window_forward(query: Tensor, keys: BiasedKeys, settings: KernelSettings) -> Attended:
    """flash_forward with a window shorter than the sequence, without documents and without a bias."""
    window, scale = _window(keys, settings), settings.softmax_scale
    out = query.new_empty(query.shape)
    lse = query.new_empty(query.shape[:3], dtype=torch.promote_types(query.dtype, torch.float32))
    for blocks, band in _groups(query, window):
        part, part_lse = kernel_forward(
            blocks.queries(query),
            blocks.keys(keys.key),
            blocks.keys(keys.value),
            causal=False,
            mask=band,
            softmax_scale=scale,
        )
        blocks.write_queries(out, part)
        blocks.write_queries(lse[..., None], part_lse[..., None])
    return Attended(out, lse)


def cpu_window_backward(
    grad_out: Tensor, query: Tensor, keys: BiasedKeys, final: Attended, settings: KernelSettings
) -> Gradients:
    """flash_backward with a window shorter than the sequence, without documents and without a bias."""
    window = _window(keys, settings)
    d_query, d_key, d_value = query.new_empty(query.shape), torch.zeros_like(keys.key), torch.zeros_like(keys.value)
    for blocks, band in _groups(query, window):
        d_queries, d_keys, d_values = kernel_backward(
            blocks.queries(grad_out),
            blocks.queries(query),
            blocks.keys(keys.key),
            blocks.keys(keys.value),
            blocks.queries(final.out),
            blocks.queries(final.lse[..., None])[..., 0].contiguous(),
            causal=False,
            mask=band,
            softmax_scale=settings.softmax_scale,
        )
        blocks.write_queries(d_query, d_queries)
        blocks.add_keys(d_key, d_keys)
        blocks.add_keys(d_value, d_values)
    return Gradients(d_query, d_key, d_value, None)


def _window(keys: BiasedKeys, settings: KernelSettings) -> int:
    assert settings.window is not None and settings.causal and keys.bias is None
    return settings.window


@dataclass(frozen=True)
class _Blocks:
    """Consecutive blocks of queries. Each sees as many keys as it has queries, and ``before`` keys before those."""

    first: int
    count: int
    length: int
    before: int

    def queries(self, x: Tensor) -> Tensor:
        """[batch, seq, heads, d] -> [batch * count, heads, length, d]."""
        return self._own(x).flatten(0, 1).transpose(1, 2)

    def keys(self, x: Tensor) -> Tensor:
        """[batch, seq, kv_heads, d] -> [batch * count, kv_heads, before + length, d]; of one batch row a view."""
        seen = x[:, self.first - self.before : self.first + self.count * self.length]
        return seen.unfold(1, self.before + self.length, self.length).movedim(-1, 2).flatten(0, 1).transpose(1, 2)

    def write_queries(self, total: Tensor, parts: Tensor) -> None:
        """The inverse of queries."""
        self._own(total).copy_(self._split(parts))

    def add_keys(self, total: Tensor, parts: Tensor) -> None:
        """The adjoint of keys. Only neighbours share keys, so neither of the two sums meets an element twice."""
        blocks = self._split(parts)
        self._own(total).add_(blocks[:, :, self.before :])
        if self.before:
            shared = total[:, self.first - self.before : self.first + (self.count - 1) * self.length]
            shared.unfold(1, self.before, self.length).movedim(-1, 2).add_(blocks[:, :, : self.before])

    def _own(self, x: Tensor) -> Tensor:
        return x[:, self.first : self.first + self.count * self.length].unflatten(1, (self.count, self.length))

    def _split(self, parts: Tensor) -> Tensor:
        return parts.transpose(1, 2).unflatten(0, (-1, self.count))


def _groups(query: Tensor, window: int) -> Iterator[tuple[_Blocks, Tensor]]:
    """Blocks that go to the kernel together, with their mask: 0 where a query sees a key, else UNSEEN.

    A block is at least as long as the window, so that only neighbours share keys.
    """
    seq, before = query.shape[1], window - 1
    block = min(max(window, SHORTEST_BLOCK), seq)
    age = torch.arange(block, device=query.device)[:, None] - torch.arange(-before, block, device=query.device)
    band = torch.zeros(age.shape, dtype=torch.promote_types(query.dtype, torch.float32), device=query.device)
    band.masked_fill_((age < 0) | (age >= window), UNSEEN)

    yield _Blocks(0, 1, block, 0), band[None, None, :, before:]
    together = max(GROUP // block, 1)
    end = seq - seq % block
    for first in range(block, end, together * block):
        yield _Blocks(first, min(together, (end - first) // block), block, before), band[None, None]
    if end < seq:
        yield _Blocks(end, 1, seq - end, before), band[None, None, : seq - end, : before + seq - end]
