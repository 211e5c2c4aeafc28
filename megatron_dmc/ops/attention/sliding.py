"""Causal attention to the last few tokens on stock flash kernels.

CUDA's flash kernels know a window. The CPU's does not: blocks of queries go to it as rows of their own, each with the keys
that it can see, and one small band mask serves all rows. Only the first block has nothing in front of it.
"""

import torch
import torch.nn.functional as F
from torch import Tensor

from megatron_dmc.ops.attention.flash import cuda_backward, cuda_forward, flash_backward, flash_forward

# Shorter blocks keep the CPU kernel waiting.
SHORTEST_BLOCK = 32

# No key's score comes near it, whatever stands behind a text's end; an infinity would empty a part of a block.
UNSEEN = -1e30

aten = torch.ops.aten


def sliding_forward(
    query: Tensor, key: Tensor, value: Tensor, window: int, softmax_scale: float
) -> tuple[Tensor, Tensor]:
    """softmax(scale q_i . k_j) v_j over i - window < j <= i.

    Args:
        query: [batch, seq, heads, head_dim].
        key, value: [batch, seq, kv_heads, head_dim].
        window: >= 1.

    Returns:
        out [batch, seq, heads, head_dim], log-sum-exp [batch, seq, heads].
    """
    seq = query.shape[1]
    if window >= seq:
        return flash_forward(query, key, value, None, causal=True, softmax_scale=softmax_scale)
    if query.is_cuda:
        return cuda_forward(query, key, value, None, True, softmax_scale, None, window)
    blocks = _Blocks(query, window)
    pieces = [
        aten._scaled_dot_product_flash_attention_for_cpu(q, k, v, 0.0, False, attn_mask=band, scale=softmax_scale)
        for q, k, v, band in zip(
            blocks.queries(query), blocks.keys(key), blocks.keys(value), blocks.bands(), strict=True
        )
    ]
    out, lse = zip(*pieces, strict=True)
    return blocks.join_queries(out), blocks.join_queries([x[..., None] for x in lse])[..., 0]


def sliding_backward(
    grad_out: Tensor,
    query: Tensor,
    key: Tensor,
    value: Tensor,
    out: Tensor,
    lse: Tensor,
    window: int,
    softmax_scale: float,
) -> tuple[Tensor, Tensor, Tensor]:
    """Gradients of query, key and value, given out and lse that may include terms from outside the window."""
    seq = query.shape[1]
    if window >= seq:
        return flash_backward(grad_out, query, key, value, out, lse, None, causal=True, softmax_scale=softmax_scale)[:3]
    if query.is_cuda:
        return cuda_backward(grad_out, query, key, value, out, lse, None, True, softmax_scale, None, window)[:3]
    blocks = _Blocks(query, window)
    pieces = [
        aten._scaled_dot_product_flash_attention_for_cpu_backward(
            grad, q, k, v, o, row[..., 0].contiguous(), 0.0, False, attn_mask=band, scale=softmax_scale
        )
        for grad, q, k, v, o, row, band in zip(
            blocks.queries(grad_out),
            blocks.queries(query),
            blocks.keys(key),
            blocks.keys(value),
            blocks.queries(out),
            blocks.queries(lse[..., None]),
            blocks.bands(),
            strict=True,
        )
    ]
    d_query, d_key, d_value = zip(*pieces, strict=True)
    return blocks.join_queries(d_query), blocks.sum_keys(d_key), blocks.sum_keys(d_value)


class _Blocks:
    """The first block of queries with its own keys, and all further blocks with theirs and window - 1 keys before them.

    A block is at least as long as the window, so only two blocks see the same key. Zeros fill the last one: a query of
    zeros gets a gradient of zeros, and no other query sees its key.
    """

    def __init__(self, query: Tensor, window: int):
        self.batch, self.seq = query.shape[:2]
        self.window = window
        self.block = min(max(window, SHORTEST_BLOCK), self.seq)
        self.rest = -(-self.seq // self.block) - 1
        self.dtype, self.device = torch.promote_types(query.dtype, torch.float32), query.device

    def queries(self, x: Tensor) -> list[Tensor]:
        """[batch, seq, heads, d] -> [batch, heads, block, d] and [batch * rest, heads, block, d]."""
        blocks = self._padded(x).unflatten(1, (-1, self.block))
        return [part.flatten(0, 1).transpose(1, 2) for part in (blocks[:, :1], blocks[:, 1:])][: 1 + (self.rest > 0)]

    def keys(self, x: Tensor) -> list[Tensor]:
        """[batch, seq, kv_heads, d] -> [batch, kv_heads, block, d] and [batch * rest, kv_heads, window - 1 + block, d]."""
        x = self._padded(x)
        first = x[:, : self.block].transpose(1, 2)
        if not self.rest:
            return [first]
        further = x[:, self.block - self.window + 1 :].unfold(1, self.window - 1 + self.block, self.block)
        return [first, further.flatten(0, 1).transpose(2, 3).contiguous()]

    def bands(self) -> list[Tensor]:
        """0 where a query sees a key, else UNSEEN; [1, 1, block, keys] for either kind of block."""
        age = torch.arange(self.block, device=self.device)[:, None] - torch.arange(
            1 - self.window, self.block, device=self.device
        )
        band = torch.zeros(age.shape, dtype=self.dtype, device=self.device)
        band.masked_fill_((age < 0) | (age >= self.window), UNSEEN)
        return [part[None, None] for part in (band[:, self.window - 1 :].contiguous(), band)][: 1 + (self.rest > 0)]

    def join_queries(self, parts: tuple[Tensor, ...] | list[Tensor]) -> Tensor:
        """The inverse of queries."""
        blocks = [part.transpose(1, 2).unflatten(0, (self.batch, -1)) for part in parts]
        return torch.cat(blocks, dim=1).flatten(1, 2)[:, : self.seq]

    def sum_keys(self, parts: tuple[Tensor, ...]) -> Tensor:
        """The adjoint of keys: what two blocks see gets the sum of both."""
        total = parts[0].new_zeros(self.batch, (1 + self.rest) * self.block, *parts[0].shape[1::2])
        total[:, : self.block] = parts[0].transpose(1, 2)
        if self.rest:
            further = parts[1].transpose(1, 2).unflatten(0, (self.batch, self.rest))
            blocks = total.unflatten(1, (-1, self.block))
            blocks[:, 1:] = further[:, :, self.window - 1 :]
            blocks[:, :-1, self.block - self.window + 1 :] += further[:, :, : self.window - 1]
        return total[:, : self.seq]

    def _padded(self, x: Tensor) -> Tensor:
        return F.pad(x, (0, 0, 0, 0, 0, (1 + self.rest) * self.block - self.seq))
