"""Tokens for the compressed cache, and its oracle."""

from typing import NamedTuple

import torch
from torch import Tensor

from megatron_dmc.ops.attention.types import Operation
from megatron_dmc.ops.decode import naive
from megatron_dmc.ops.rotary import rotate
from tests.support.oracle import Draw, Shape


class Stream(NamedTuple):
    """Queries, keys, values before rotary embedding and their decisions, [batch, seq, ...]."""

    query: Tensor
    key: Tensor
    value: Tensor
    alpha: Tensor
    omega: Tensor

    def cut(self, start: int, stop: int) -> "Stream":
        return Stream(*(x[:, start:stop] for x in self))


def draw_stream(shape: Shape, dtype: torch.dtype, merge: float = 0.6) -> Stream:
    """Heads merge at different rates, so that their lengths part."""
    draw = Draw(shape.seq + shape.heads)
    keys = shape.batch, shape.seq, shape.kv_heads, shape.head_dim
    rate = merge * torch.linspace(0.87, 1.13, shape.kv_heads)
    return Stream(
        draw.normal(shape.batch, shape.seq, shape.heads, shape.head_dim).to(dtype),
        draw.normal(*keys).to(dtype),
        draw.normal(*keys).to(dtype),
        draw.uniform(*keys[:3]) < rate,
        draw.omega(shape).to(dtype),
    )


def rotation(positions: Tensor, head_dim: int, dtype: torch.dtype = torch.float64) -> tuple[Tensor, Tensor]:
    """cos and sin of positions [batch, seq] -> [batch, seq, 1, head_dim]."""
    frequency = 100.0 ** -(torch.arange(0, head_dim, 2, dtype=torch.float64) / head_dim)
    angle = positions[..., None, None] * frequency.repeat(2)
    return angle.cos().to(dtype), angle.sin().to(dtype)


def oracle(stream: Stream, local_window: int, operation: Operation, *, clears_last_channel: bool = False) -> Tensor:
    """naive.decode of every sequence and head in float64: [batch, seq, heads, head_dim].

    Args:
        clears_last_channel: the last channel of queries has no say in the scores.
    """
    kv_heads = stream.key.shape[2]
    query, key, value, alpha, omega = (x if x.dtype == torch.bool else x.double() for x in stream)
    grouped = query.unflatten(2, (kv_heads, -1))

    def rotate_at(x: Tensor, position: int) -> Tensor:
        cos, sin = rotation(torch.tensor([[position]]), x.shape[-1])
        rotated = rotate(x.view(1, 1, -1, x.shape[-1]), cos, sin).view_as(x)
        if clears_last_channel:
            rotated[..., -1] = 0
        return rotated

    out = torch.empty_like(grouped)
    for b in range(len(key)):
        for h in range(kv_heads):
            head = (grouped[b, :, h], key[b, :, h], value[b, :, h], alpha[b, :, h], omega[b, :, h])
            out[b, :, h], _ = naive.decode(*head, rotate_at, local_window=local_window, operation=operation)
    return out.flatten(2, 3)
