"""A sequence that is cut over the ranks of a context-parallel group, and its exchanges.

It is cut as megatron-core cuts it: into 2 * ranks chunks, of which rank r holds chunks r and 2 * ranks - 1 - r, one after the
other. In causal attention an early chunk is little work and a late one much, so all ranks have the same work.
"""

from collections.abc import Callable
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor

# torch 2.13 renamed both, and warns of the names that older versions know.
_all_gather = getattr(dist, "all_gather_single", None) or dist.all_gather_into_tensor
_reduce_scatter = getattr(dist, "reduce_scatter_single", None) or dist.reduce_scatter_tensor

_Map = Callable[[Tensor, dist.ProcessGroup], Tensor]


def chunk_numbers(group: dist.ProcessGroup) -> tuple[int, int]:
    """The two chunks that this rank holds, of 2 * ranks."""
    rank, ranks = dist.get_rank(group), dist.get_world_size(group)
    return rank, 2 * ranks - 1 - rank


def local_positions(local_length: int, group: dist.ProcessGroup | None) -> Tensor:
    """int64 [local_length]: which of the sequence's tokens this rank holds; None: all."""
    if group is None or dist.get_world_size(group) == 1:
        return torch.arange(local_length)
    chunk = local_length // 2
    return torch.cat([torch.arange(n * chunk, (n + 1) * chunk) for n in chunk_numbers(group)])


def gather_sequence(x: Tensor, group: dist.ProcessGroup) -> Tensor:
    """[batch, seq / ranks, ...] of every rank -> [batch, seq, ...] in the sequence's order. Not differentiable."""
    ranks = dist.get_world_size(group)
    parts = x.new_empty((ranks * x.shape[0], *x.shape[1:]))
    _all_gather(parts, x.contiguous(), group=group)
    return _in_order(parts.unflatten(0, (ranks, -1)))


def sum_to_local(x: Tensor, group: dist.ProcessGroup) -> Tensor:
    """The adjoint of gather_sequence: [batch, seq, ...] summed over the ranks -> this rank's [batch, seq / ranks, ...]."""
    parts = _by_rank(x, dist.get_world_size(group))
    local = torch.empty_like(parts[0])
    _reduce_scatter(local, parts.flatten(0, 1), group=group)
    return local


def gather_sequence_with_gradient(x: Tensor, group: dist.ProcessGroup) -> Tensor:
    """gather_sequence with a gradient: the sum over the gradients that all ranks have of the whole."""
    return _Exchange.apply(x, group, gather_sequence, sum_to_local)


def swap_to_heads(x: Tensor, group: dist.ProcessGroup) -> Tensor:
    """[batch, seq / ranks, heads, ...] -> [batch, seq, heads / ranks, ...]: a part of the sequence for a part of the heads."""
    return _Exchange.apply(x, group, _to_heads, _to_sequence)


def swap_to_sequence(x: Tensor, group: dist.ProcessGroup) -> Tensor:
    """The inverse of swap_to_heads."""
    return _Exchange.apply(x, group, _to_sequence, _to_heads)


class _Exchange(torch.autograd.Function):
    """A linear map between ranks, and its adjoint for the gradient."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, group: dist.ProcessGroup, exchange: _Map, adjoint: _Map) -> Tensor:
        ctx.group, ctx.adjoint = group, adjoint
        return exchange(x, group)

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor | None, ...]:
        return ctx.adjoint(grads[0], ctx.group), None, None, None


def _to_heads(x: Tensor, group: dist.ProcessGroup) -> Tensor:
    ranks = dist.get_world_size(group)
    sent = x.unflatten(2, (ranks, -1)).movedim(2, 0).contiguous()  # [ranks, batch, seq / ranks, heads / ranks, ...]
    received = torch.empty_like(sent)
    dist.all_to_all_single(received, sent, group=group)
    return _in_order(received)


def _to_sequence(x: Tensor, group: dist.ProcessGroup) -> Tensor:
    sent = _by_rank(x, dist.get_world_size(group))
    received = torch.empty_like(sent)
    dist.all_to_all_single(received, sent, group=group)
    return received.movedim(0, 2).flatten(2, 3)


def _in_order(parts: Tensor) -> Tensor:
    """What every rank holds, [ranks, batch, seq / ranks, ...] -> the sequence, [batch, seq, ...]."""
    early, late = parts.unflatten(2, (2, -1)).unbind(2)  # [ranks, batch, chunk, ...]
    return torch.cat([early, late.flip(0)]).movedim(0, 1).flatten(1, 2)


def _by_rank(x: Tensor, ranks: int) -> Tensor:
    """The inverse of _in_order."""
    chunks = x.unflatten(1, (2 * ranks, -1)).movedim(1, 0)
    return torch.stack([chunks[:ranks], chunks[ranks:].flip(0)], dim=2).flatten(2, 3)
