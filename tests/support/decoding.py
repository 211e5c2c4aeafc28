"""Tokens for the compressed cache, and its oracle."""

import copy
from collections.abc import Sequence
from pathlib import Path
from typing import NamedTuple, get_args

import pytest
import torch
from torch import Tensor

from megatron_dmc.ops.attention.types import Operation
from megatron_dmc.ops.decode import LayerCache, naive
from megatron_dmc.ops.decode.codes import CacheDtype
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


class Kind(NamedTuple):
    """How tokens are kept: LayerCache's first arguments."""

    local_window: int = 0
    operation: Operation = "merge"
    window_size: int | None = None


KINDS: dict[str, Kind] = {
    "exact": Kind(),
    "truncated12": Kind(window_size=12),
    **{f"{operation}-w{w}": Kind(w, operation) for operation in get_args(Operation) for w in (1, 16, 100)},
    "merge-w5-truncated12": Kind(5, "merge", 12),
}
by_kind = pytest.mark.parametrize("kind", KINDS.values(), ids=KINDS)


def through_cache(tokens: Stream, cuts: Sequence[int], cache: LayerCache) -> Tensor:
    """Feeds the tokens in pieces of the given sizes."""
    outputs, start = [], 0
    for size in cuts:
        part = tokens.cut(start, start + size)
        positions = (cache.tokens if len(cache.tokens) else torch.zeros(1))[:, None] + torch.arange(size)
        cos, sin = rotation(positions, tokens.key.shape[-1], tokens.key.dtype)
        outputs.append(cache.attend(*part, cos, sin))
        start += size
    return torch.cat(outputs, dim=1)


def oracle(
    stream: Stream, kind: Kind, *, clears_last_channel: bool = False, cache_dtype: CacheDtype | None = None
) -> tuple[Tensor, Tensor]:
    """naive.decode of every sequence and head in float64.

    Args:
        clears_last_channel: the last channel of queries has no say in the scores.
        cache_dtype: of the slots that are kept.

    Returns:
        Outputs [batch, seq, heads, head_dim] and slot counts [batch, kv_heads], the window's tokens counted.
    """
    batch, seq, kv_heads, _ = stream.key.shape
    query, *rest = (x if x.dtype == torch.bool else x.double() for x in stream)
    grouped = query.unflatten(2, (kv_heads, -1))

    def rotate_at(x: Tensor, position: int) -> Tensor:
        cos, sin = rotation(torch.tensor([[position]]), x.shape[-1])
        rotated = rotate(x.view(1, 1, -1, x.shape[-1]), cos, sin).view_as(x)
        if clears_last_channel:
            rotated[..., -1] = 0
        return rotated

    out, counts = torch.empty_like(grouped), torch.empty(batch, kv_heads, dtype=torch.long)
    for b in range(batch):
        for h in range(kv_heads):
            head = (grouped[b, :, h], *(x[b, :, h] for x in rest))
            out[b, :, h], slots = naive.decode(*head, rotate_at, **kind._asdict(), cache_dtype=cache_dtype)
            counts[b, h] = len(slots) + min(seq, kind.local_window)
    return out.flatten(2, 3), counts


def another(cache: LayerCache, way: str, empty: LayerCache, folder: Path) -> LayerCache:
    """A cache that goes on from where this one is, by a way: deepcopy, moved, or saved, which fills ``empty``."""
    if way != "saved":
        other = copy.deepcopy(cache)
        return other.to("cpu") if way == "moved" else other
    torch.save(cache.state_dict(), folder / "cache.pt")
    empty.load_state_dict(torch.load(folder / "cache.pt", weights_only=True))
    return empty
