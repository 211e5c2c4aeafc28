"""The worker's cache: all state lies in the requests' own blocks, and ``ops/decode`` computes with it."""

import math
from collections.abc import Iterable, Mapping
from typing import NamedTuple

import torch
from torch import Tensor

from megatron_dmc.ops.decode.chunk import take_in_chunk
from megatron_dmc.ops.decode.layout import Layout
from megatron_dmc.ops.decode.memory import Memory
from megatron_dmc.ops.decode.sequences import Chunk, ManyTokens, Step
from megatron_dmc.ops.decode.torch import step
from megatron_dmc.ops.tokens import Tokens
from megatron_dmc.serving import kernels
from megatron_dmc.serving.copies import to_device
from megatron_dmc.serving.decoding import Decoding, rotation_at
from megatron_dmc.serving.grants import GrantedBlocks
from megatron_dmc.serving.header import KEPT, Header
from megatron_dmc.serving.reports import Reports
from megatron_dmc.serving.rows import EngineRows
from megatron_dmc.serving.spec import DMCSpec


class NewTokens(NamedTuple):
    """n tokens in one layer.

    Attributes:
        query: [n, heads, head_dim], before rotary embedding.
        key, value: [n, kv_heads, head_dim], before rotary embedding.
        alpha: bool [n, kv_heads], of decision logits above the requests' thresholds.
        omega: float32 [n, kv_heads].
    """

    query: Tensor
    key: Tensor
    value: Tensor
    alpha: Tensor
    omega: Tensor


class Request(NamedTuple):
    """Of a batch: which rows of it are its new tokens; the blocks that hold its state; tokens seen before."""

    rows: range
    blocks: list[int]
    seen: int


class Group:
    """Requests whose tokens are taken in together: one token each, or one request's chunk. Layers share it in a step.

    Attributes:
        rows: which of the batch's tokens are theirs.
        blocks: int64 [requests, header blocks], those that hold their state.
        places: int64 [requests], where their granted blocks are listed.
        seen: int64 [requests], tokens before the new ones; 0: there is no state yet.
        chunk: how many new ones the only request has; None: each of them has one.
        longest: tokens that a request has at most after the step; None where one is new.
    """

    def __init__(self, rows: Tensor | slice, requests: list[Request], places: list[int], chunk: int | None = None):
        """places: of each request."""
        self.rows, self.chunk = rows, chunk
        self.blocks = torch.tensor([each.blocks for each in requests], device="cpu")
        self.seen = torch.tensor([each.seen for each in requests], device="cpu")
        self.places = torch.tensor(places, device="cpu")
        tokens = [each.seen for each in requests]
        self.longest = max(tokens) + (chunk or 1) if min(tokens) else None
        self._call: Step | Chunk | None = None

    def call(self, layout: Layout, angles: Tensor, dtype: torch.dtype) -> Step | Chunk:
        """What all layers know together.

        Args:
            angles: [positions, cos | sin], each head_dim / 2 wide.
            dtype: of the queries.
        """
        if self._call is None:
            device = angles.device
            self.blocks, self.seen, self.places = (x.to(device) for x in (self.blocks, self.seen, self.places))
            if self.chunk is None:
                leaving = self.seen - layout.local_window
                self._call = Step(
                    layout, self.seen, rotation_at(self.seen, angles, dtype), rotation_at(leaving, angles, dtype)
                )
                self._call.tokens = self.seen + 1
            else:
                self._call = Chunk(layout, self.seen, None, self.chunk)
                positions = (self.seen - self._call.held)[:, None] + self._call.column
                self._call.cos, self._call.sin = (x[:, :, None] for x in rotation_at(positions, angles, dtype))
        return self._call


class Chunks:
    """Requests with any number of new tokens each, as kernels are told of them. Layers share it in a step.

    Attributes:
        many: what they know of them.
        place: int64 [requests], the blocks that hold their state.
    """

    def __init__(self, requests: list[Request], window: int, angles: Tensor, dtype: torch.dtype):
        """
        Args:
            window: local_window.
            angles: [positions, cos | sin], each head_dim / 2 wide.
            dtype: of the queries.
        """
        position = torch.zeros(max(each.rows.stop for each in requests), dtype=torch.long)
        for each in requests:
            position[each.rows.start : each.rows.stop] = torch.arange(each.seen, each.seen + len(each.rows))
        starts, counts, seen, self.place = (
            torch.tensor(numbers, dtype=torch.long)
            for numbers in zip(*((x.rows.start, len(x.rows), x.seen, x.blocks[0]) for x in requests), strict=True)
        )
        new, leaving = (rotation_at(each, angles, dtype) for each in (position, position - window))
        self.many = ManyTokens(seen + counts, starts, counts, *new, *leaving)


class WorkerCache:
    """All blocks of this worker as cells [block, layer, head] of [slot, key | value], any of which any head may take.

    Args:
        kv_caches: by layer, [block, head, slot, 2 * head_dim] as vLLM bound them, of one allocation in layout BLHNC; where
            kept slots are codes, uint8 [block, head, slot, bytes of a slot].
        header: of every layer.
        spec: of every layer.
        requests: at once.
    """

    def __init__(self, kv_caches: Mapping[str, Tensor], header: Header, spec: DMCSpec, requests: int):
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
        self.blocks = self.words.view(blocks, self.rows, -1)
        self.granted = GrantedBlocks(requests, spec.most_blocks, blocks, self.rows, pool.device)
        self.kernels = kernels.of(header, pool.device.type) if spec.by_kernels else None
        self.memories = {name: self._memory(name) for name in self.index} if self.kernels else {}
        # Above which a request's tokens merge, by its first block: at an address that a captured graph may keep.
        self.thresholds = torch.zeros(blocks, device=pool.device)
        self.scheduled: list[int] = []

    def _memory(self, layer: str) -> Memory:
        """A layer's rows where kernels find them: in the words of the requests' headers, which are one block each."""
        start, header = self.index[layer] * self.heads, self.header
        words = self.blocks[:, start : start + self.heads]
        reals = words.view(torch.float32)
        return Memory(
            slots=self.slots,
            cells=len(self.words),
            table=words[..., header.table],
            kept=words[..., KEPT],
            sums=reals[..., header.sums] if header.layout.has_sums else None,
            decisions=reals[..., header.decisions] if header.layout.local_window else None,
            recent=reals[..., header.recent] if header.layout.recent else None,
            grants=self.granted.lists,
            codes=header.layout.codes(header.head_dim),
            near_cells=header.near,
        )

    def begin_step(
        self, changes: Mapping[int, tuple[int, list[int]]], ended: Iterable[int], thresholds: Mapping[int, float]
    ) -> None:
        """Before a step's forward pass, on its stream: the step before it may still run. See GrantedBlocks.plan.

        Args:
            thresholds: of requests whose threshold is another one from now on, by first blocks.
        """
        writes = self.granted.plan(changes, ended)
        new = [block for _, blocks in changes.values() for block in blocks]
        self.scheduled = list(changes)
        places = [self.granted.places[first] for first in self.scheduled]
        parts = [list(writes), list(writes.values()), new, self.scheduled, places]
        index, value, new_blocks, self.firsts, self.places = to_device(parts, self.words.device)
        if writes:
            self.granted.numbers.index_copy_(0, index, value.int())
        if new:
            # They may hold what was a header, NaN as a number, and 0 * NaN is NaN.
            self.blocks.index_fill_(0, new_blocks, 0)
        if thresholds:
            firsts, values = to_device([list(thresholds), list(thresholds.values())], self.words.device, torch.float64)
            self.thresholds.index_copy_(0, firsts.long(), values.float())
        # vLLM's warm-up may have left anything in its null block, which is read with weight 0.
        self.words[0].zero_()

    def reports(self) -> Reports:
        """After a step, of the requests that had tokens in it. Waits for nothing."""
        slots = self.blocks[..., KEPT][self.firsts].sum(1)
        if self.header.layout.absorbs:
            masses = self.blocks[..., self.header.sums.stop - 1][self.firsts].view(torch.float32)
            # Of a row that has kept nothing, it has not been written.
            slots = slots + ((masses > 0) & (self.blocks[..., KEPT][self.firsts] > 0)).sum(1)
        lists = self.granted.lists
        numbers = torch.stack([lists.cursor[self.places], slots, lists.overflow[self.places]])
        return Reports(self.scheduled, numbers, self.rows)

    def decode(self, layer: str, step: Decoding, new: NewTokens, out: Tensor) -> None:
        """One token of each request of a batch's beginning, by kernels: nothing is read back, so it can be captured.

        Args:
            out: [requests, heads, head_dim], to be filled; 0 for those that are none.
        """
        memory = self.memories[layer]._replace(place=step.place)
        tokens = Tokens(*new[1:], step.cos, step.sin)
        assert self.kernels is not None
        scale = 1 / math.sqrt(new.query.shape[-1])
        self.kernels.step_in(memory, new.query, tokens, self.header.layout, step, scale, out=out)

    def take_in(self, layer: str, chunks: Chunks, new: NewTokens) -> Tensor:
        """Any number of tokens of each request, by kernels.

        Args:
            new: the batch's, of which these are a part.

        Returns:
            [n, heads, head_dim], 0 for tokens of other requests.
        """
        assert self.kernels is not None and self.kernels.take_in is not None
        memory = self.memories[layer]._replace(place=chunks.place)
        tokens = Tokens(*new[1:], chunks.many.cos, chunks.many.sin)
        scale = 1 / math.sqrt(new.query.shape[-1])
        return self.kernels.take_in(memory, new.query, tokens, self.header.layout, chunks.many, scale)

    def attend(self, layer: str, group: Group, new: NewTokens, angles: Tensor) -> Tensor:
        """The next tokens of a group's requests in one layer: takes them in and returns their attention.

        It waits for the device several times in each layer. That is right for a prompt's chunk, which is much work for each
        wait, and wherever there are no kernels.

        Args:
            new: the group's tokens.
            angles: [positions, cos | sin], each head_dim / 2 wide.

        Returns:
            [n, heads, head_dim].
        """
        call = group.call(self.header.layout, angles, new.query.dtype)
        where = self._header_cells(group.blocks, self.index[layer])
        # Of a header that is one block, only the part in use travels.
        used = None if group.longest is None or where.shape[-1] > 1 else self.header.words(group.longest)
        headers = self.words[:, :used]
        words = headers[where].flatten(2)
        words.masked_fill_((group.seen == 0)[:, None, None], 0)
        rows = EngineRows(self.header, words, group.seen, self.slots, grants=self.granted.lists, places=group.places)
        scale = 1 / math.sqrt(new.query.shape[-1])
        if isinstance(call, Step):
            out = step(new.query, Tokens(*new[1:], call.cos, call.sin), rows, call, scale)
        else:
            alone = NewTokens(*(x[None] for x in new))
            tokens = Tokens(*alone[1:], call.cos[:, -call.seq :], call.sin[:, -call.seq :])
            out = take_in_chunk(alone.query, tokens, rows, call, scale)[0]
        after = rows.finished()
        headers[where] = after.unflatten(-1, (where.shape[-1], -1))
        return out

    def _header_cells(self, blocks: Tensor, layer: int) -> Tensor:
        """blocks [requests, header blocks] -> [requests, heads, header blocks]"""
        heads = torch.arange(self.heads, device=blocks.device)
        return (blocks * self.rows + layer * self.heads)[:, None] + heads[:, None]
