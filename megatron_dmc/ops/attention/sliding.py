"""Causal attention to the last few tokens on stock flash kernels.

CUDA's flash kernels know a window. The CPU's does not: blocks of queries go to it as rows of their own, each with the keys
that it can see, and one small band mask serves all rows. Only the first block has nothing in front of it.
"""

from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from megatron_dmc.ops.attention.documents import Documents, by_documents
from megatron_dmc.ops.attention.flash import cuda_backward, cuda_forward, flash_backward, flash_forward, unpadded

# Shorter blocks keep the CPU kernel waiting.
SHORTEST_BLOCK = 32

# Tokens that go to it in one call: what is copied stays small beside the tensors.
GROUP = 1024

# No key's score comes near it; an infinity would empty a part of a block.
UNSEEN = -1e30

aten = torch.ops.aten


def sliding_forward(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    window: int,
    softmax_scale: float,
    documents: Documents | None = None,
) -> tuple[Tensor, Tensor]:
    """softmax(scale q_i . k_j) v_j over i - window < j <= i.

    Args:
        query: [batch, seq, heads, head_dim].
        key, value: [batch, seq, kv_heads, head_dim].
        window: >= 1.
        documents: of tokens [1, tokens, ...], no document sees another.

    Returns:
        out [batch, seq, heads, head_dim], log-sum-exp [batch, seq, heads].
    """
    seq = query.shape[1]
    if window >= seq:
        return flash_forward(query, key, value, None, causal=True, softmax_scale=softmax_scale, documents=documents)
    if query.is_cuda:
        return cuda_forward(query, key, value, None, True, softmax_scale, None, window, documents)
    if documents is not None:

        def rows(_: Tensor, query: Tensor, key: Tensor, value: Tensor) -> tuple[Tensor, Tensor]:
            return sliding_forward(query, key, value, window, softmax_scale)

        out, lse = by_documents(documents, rows, query, key, value)
        return out, lse
    out = query.new_empty(query.shape)
    lse = query.new_empty(query.shape[:3], dtype=torch.promote_types(query.dtype, torch.float32))
    for blocks, band in _groups(query, window):
        part, part_lse = aten._scaled_dot_product_flash_attention_for_cpu(
            blocks.queries(query), blocks.keys(key), blocks.keys(value), 0.0, False, attn_mask=band, scale=softmax_scale
        )
        blocks.write_queries(out, part)
        blocks.write_queries(lse[..., None], part_lse[..., None])
    return out, lse


def sliding_backward(
    grad_out: Tensor,
    query: Tensor,
    key: Tensor,
    value: Tensor,
    out: Tensor,
    lse: Tensor,
    window: int,
    softmax_scale: float,
    documents: Documents | None = None,
) -> tuple[Tensor, Tensor, Tensor]:
    """Gradients of query, key and value, given out and lse that may include terms from outside the window."""
    seq = query.shape[1]
    tensors = grad_out, query, key, value, out, lse
    if window >= seq:
        return flash_backward(*tensors, None, causal=True, softmax_scale=softmax_scale, documents=documents)[:3]
    if query.is_cuda:
        return cuda_backward(*tensors, None, True, softmax_scale, None, window, documents)[:3]
    if documents is not None:

        def by_rows(inside: Tensor, *tensors: Any) -> tuple[Tensor, Tensor, Tensor]:
            return sliding_backward(*unpadded(inside, *tensors), window, softmax_scale)

        d_query, d_key, d_value = by_documents(documents, by_rows, *tensors)
        return d_query, d_key, d_value
    d_query, d_key, d_value = query.new_empty(query.shape), torch.zeros_like(key), torch.zeros_like(value)
    for blocks, band in _groups(query, window):
        d_queries, d_keys, d_values = aten._scaled_dot_product_flash_attention_for_cpu_backward(
            blocks.queries(grad_out),
            blocks.queries(query),
            blocks.keys(key),
            blocks.keys(value),
            blocks.queries(out),
            blocks.queries(lse[..., None])[..., 0].contiguous(),
            0.0,
            False,
            attn_mask=band,
            scale=softmax_scale,
        )
        blocks.write_queries(d_query, d_queries)
        blocks.add_keys(d_key, d_keys)
        blocks.add_keys(d_value, d_values)
    return d_query, d_key, d_value


@dataclass(frozen=True)
class _Blocks:
    """Consecutive blocks of queries, each with as many keys as queries and ``before`` more in front of them."""

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
