"""The worker's cache: all state lies in the requests' own blocks, and ``ops/decode`` computes with it."""

import math
from collections.abc import Iterable, Mapping
from typing import NamedTuple

import torch
from torch import Tensor
from vllm.utils.math_utils import cdiv

from megatron_dmc.ops.decode.chunk import take_in_chunk
from megatron_dmc.ops.decode.layout import Layout
from megatron_dmc.ops.decode.sequences import Chunk, Step
from megatron_dmc.ops.decode.torch import step
from megatron_dmc.ops.rotary import rotate
from megatron_dmc.ops.tokens import Tokens
from megatron_dmc.serving.header import KEPT, SEEN, Header
from megatron_dmc.serving.rows import EngineRows, Grant


class NewTokens(NamedTuple):
    """n tokens in one layer.

    Attributes:
        query: [n, heads, head_dim], before rotary embedding.
        key, value: [n, kv_heads, head_dim], before rotary embedding.
        alpha: bool [n, kv_heads].
        omega: float32 [n, kv_heads].
    """

    query: Tensor
    key: Tensor
    value: Tensor
    alpha: Tensor
    omega: Tensor


class Group:
    """Requests whose tokens are taken in together: one token each, or one request's chunk. Layers share it in a step.

    Attributes:
        rows: which of the batch's tokens are theirs.
        blocks: int64 [requests, header blocks], those that hold their state.
        seen: int64 [requests], tokens before the new ones; 0: there is no state yet.
        chunk: how many new ones the only request has; None: each of them has one.
        longest: tokens that a request has at most after the step; None where one is new.
    """

    def __init__(self, rows: Tensor | slice, blocks: list[list[int]], seen: list[int], chunk: int | None = None):
        self.rows, self.chunk = rows, chunk
        self.blocks, self.seen = torch.tensor(blocks, device="cpu"), torch.tensor(seen, device="cpu")
        self.firsts = [each[0] for each in blocks]
        self.longest = max(seen) + (chunk or 1) if min(seen) else None
        self._call: Step | Chunk | None = None

    def call(self, layout: Layout, angles: Tensor, dtype: torch.dtype) -> Step | Chunk:
        """What all layers know together.

        Args:
            angles: [positions, cos | sin], each head_dim / 2 wide.
            dtype: of the queries.
        """
        if self._call is None:
            device = angles.device
            self.blocks, self.seen = self.blocks.to(device), self.seen.to(device)

            def rotation(positions: Tensor) -> tuple[Tensor, Tensor]:
                # Both halves of a rotation are alike. Before the first position, nobody reads it.
                cos, sin = angles[positions.clamp(min=0)].to(dtype).chunk(2, dim=-1)
                return cos.repeat(*(1,) * (cos.ndim - 1), 2), sin.repeat(*(1,) * (sin.ndim - 1), 2)

            if self.chunk is None:
                leaving = self.seen - layout.local_window
                self._call = Step(layout, self.seen, rotation(self.seen), rotation(leaving))
            else:
                self._call = Chunk(layout, self.seen, None, self.chunk)
                positions = (self.seen - self._call.held)[:, None] + self._call.column
                self._call.cos, self._call.sin = (x[:, :, None] for x in rotation(positions))
        return self._call


class Held(NamedTuple):
    """What a request holds on this worker: blocks in which it has taken cells, and slots of all layers and heads."""

    blocks: int
    slots: int


class WorkerCache:
    """All blocks of this worker as cells [block, layer, head] of [slot, key | value], any of which any head may take.

    Args:
        kv_caches: by layer, [block, head, slot, 2 * head_dim] as vLLM bound them, of one allocation in layout BLHNC.
        header: of every layer.
    """

    def __init__(self, kv_caches: Mapping[str, Tensor], header: Header):
        views = sorted(kv_caches.items(), key=lambda item: item[1].data_ptr())
        first = views[0][1]
        self.header = header
        self.index = {name: i for i, (name, _) in enumerate(views)}
        blocks, self.heads, page, width = first.shape
        between = (views[1][1].data_ptr() - first.data_ptr()) // first.element_size() if len(views) > 1 else 0
        shape = blocks, len(views), self.heads, page, width
        pool = first.as_strided(shape, (first.stride(0), between or first.stride(0), *first.stride()[1:]))
        if not pool.is_contiguous():
            raise RuntimeError(f"a model with DMC needs KV caches in layout BLHNC, got strides {pool.stride()}")
        self.slots = pool.view(-1, width)
        self.words = pool.view(-1, page * width).view(torch.int32)
        # Rows of a request: its (layer, head) pairs on this worker.
        self.rows = len(views) * self.heads
        self.granted: dict[int, Grant] = {}

    def grant(self, changes: Mapping[int, tuple[int, list[int]]]) -> None:
        """Before a step: by a request's first block, how many of its blocks it keeps and which it gets; none kept: it is new.

        A request fills them in the order of the list, so those that are taken away were never written to.
        """
        for first, (kept, new) in changes.items():
            if kept == 0 or first not in self.granted:
                self.granted[first] = Grant(self.rows)
            grant = self.granted[first]
            grant.blocks = grant.blocks[:kept] + new

    def held(self, requests: Iterable[int]) -> dict[int, Held]:
        """After a step, by the requests' first blocks."""
        return {first: self._held(first) for first in requests}

    def _held(self, first: int) -> Held:
        own = self.words[first * self.rows : (first + 1) * self.rows]
        layout = self.header.layout
        slots = int(own[:, KEPT].sum() + own[:, SEEN].clamp(max=layout.local_window).sum())
        if layout.absorbs:
            slots += int((own.view(torch.float32)[:, self.header.sums.stop - 1] > 0).sum())
        return Held(cdiv(self.granted[first].taken, self.rows), slots)

    def attend(self, layer: str, group: Group, new: NewTokens, angles: Tensor) -> Tensor:
        """The next tokens of a group's requests in one layer: takes them in and returns their attention.

        Args:
            new: the group's tokens.
            angles: [positions, cos | sin], each head_dim / 2 wide.

        Returns:
            [n, heads, head_dim].

        Raises:
            RuntimeError: a request needs more cells than it was granted.
        """
        call = group.call(self.header.layout, angles, new.query.dtype)
        where = self._header_cells(group.blocks, self.index[layer])
        # Of a header that is one block, only the part in use travels.
        used = None if group.longest is None or where.shape[-1] > 1 else self.header.words(group.longest)
        headers = self.words[:, :used]
        words = headers[where].flatten(2)
        words.masked_fill_((group.seen == 0)[:, None, None], 0)
        grants = [self.granted[first] for first in group.firsts]
        rows = EngineRows(self.header, words, group.seen, self.slots, grants)
        scale = 1 / math.sqrt(new.query.shape[-1])
        if isinstance(call, Step):
            tokens = Tokens(*new[1:], call.cos, call.sin)
            out = step(new.query, tokens, rows, call, scale)
        else:
            out = take_in_chunk(*self._rotated(new, call), rows, call, scale)[0]
        after = rows.finished(group.chunk or 1)
        headers[where] = after.unflatten(-1, (where.shape[-1], -1))
        return out

    def _rotated(self, new: NewTokens, call: Chunk) -> tuple[Tensor, Tokens]:
        """A chunk's query, and its tokens with a key that is rotated if there is a ring; each as a batch of one."""
        query, key, value, alpha, omega = (x[None] for x in new)
        cos, sin = call.cos[:, -call.seq :], call.sin[:, -call.seq :]
        query = rotate(query, cos, sin)
        if self.header.layout.clears_last_channel:
            query[..., -1] = 0
        if self.header.layout.local_window:
            key = rotate(key, cos, sin)
        return query, Tokens(key, value, alpha, omega, call.cos, call.sin)

    def _header_cells(self, blocks: Tensor, layer: int) -> Tensor:
        """blocks [requests, header blocks] -> [requests, heads, header blocks]"""
        heads = torch.arange(self.heads, device=blocks.device)
        return (blocks * self.rows + layer * self.heads)[:, None] + heads[:, None]
