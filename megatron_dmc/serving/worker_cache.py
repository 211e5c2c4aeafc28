"""The worker's cache: all state lies in the requests' own blocks. Plain torch, one request and layer at a time.

The rest of the plugin knows :class:`Header`, :class:`NewTokens`, :class:`Request`, :class:`Held`, :class:`Rows` and the
functions of :class:`WorkerCache`.
"""

import math
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from typing import NamedTuple

import torch
from torch import Tensor
from vllm.utils.math_utils import cdiv

from megatron_dmc.ops.rotary import rotate

# Words of a header: closed slots; cells that the request has taken, kept by the first head of the first layer; the open
# slot's weight and sums; tokens in the ring.
_LENGTH, _CURSOR, _WEIGHT, _NEAR, _SUMS = range(5)


@dataclass(frozen=True)
class Header:
    """The state of one (request, layer, KV head) in words of 4 bytes: numbers, open slot's sums, ring, page table.

    Attributes:
        head_dim: d.
        local_window: tokens in the ring; each takes 2 d + 2 words: key, value, alpha, omega.
    """

    head_dim: int
    local_window: int

    @property
    def ring(self) -> int:
        """Where the ring begins."""
        return _SUMS + 2 * self.head_dim

    @property
    def table(self) -> int:
        """Where the page table begins."""
        return self.ring + self.local_window * (2 * self.head_dim + 2)

    def blocks(self, pages: int, cell_words: int) -> int:
        """A request's first blocks that hold its state, if a head's table has ``pages`` entries and a cell so many words."""
        return cdiv(self.table + pages, cell_words)


class Rows(NamedTuple):
    """What a layer says of its heads.

    Attributes:
        header: their form.
        clears_last_channel: whether the last channel of queries and keys is set to zero after the rotation (``neuron``).
        angles: [positions, cos | sin], each head_dim / 2 wide.
    """

    header: Header
    clears_last_channel: bool
    angles: Tensor


class NewTokens(NamedTuple):
    """n tokens in one layer, of one request or of several one after the other.

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


class Request(NamedTuple):
    """blocks: the ids of those that hold its state. seen: tokens before the new ones; 0: there is no state yet."""

    blocks: list[int]
    seen: int


class Held(NamedTuple):
    """What a request holds on this worker: blocks in which it has taken cells, and slots of all layers and heads."""

    blocks: int
    slots: int


class WorkerCache:
    """All blocks of this worker as cells [block, layer, head] of [slot, key | value], any of which any head may take.

    Args:
        kv_caches: by layer, [block, head, slot, 2 * head_dim] as vLLM bound them, of one allocation in layout BLHNC.
    """

    def __init__(self, kv_caches: Mapping[str, Tensor]):
        views = sorted(kv_caches.items(), key=lambda item: item[1].data_ptr())
        first = views[0][1]
        self.index = {name: i for i, (name, _) in enumerate(views)}
        blocks, self.heads, self.page, width = first.shape
        between = (views[1][1].data_ptr() - first.data_ptr()) // first.element_size() if len(views) > 1 else 0
        shape = blocks, len(views), self.heads, self.page, width
        pool = first.as_strided(shape, (first.stride(0), between or first.stride(0), *first.stride()[1:]))
        if not pool.is_contiguous():
            raise RuntimeError(f"a model with DMC needs KV caches in layout BLHNC, got strides {pool.stride()}")
        self.cells = pool.view(-1, self.page, width)
        self.words = pool.view(-1, self.page * width).view(torch.int32)
        # Rows of a request: its (layer, head) pairs on this worker.
        self.rows = len(views) * self.heads
        self.granted: dict[int, list[int]] = {}

    def grant(self, changes: Mapping[int, tuple[int, list[int]]]) -> None:
        """Before a step: by a request's first block, how many of its blocks it keeps and which it gets; none kept: it is new.

        A request fills them in the order of the list, so those that are taken away were never written to.
        """
        for first, (kept, new) in changes.items():
            self.granted[first] = self.granted.get(first, [])[:kept] + new
            if kept == 0:
                self.words[first * self.rows, _CURSOR] = 0

    def held(self, requests: Iterable[int]) -> dict[int, Held]:
        """After a step, by the requests' first blocks."""
        return {first: self._held(first) for first in requests}

    def _held(self, first: int) -> Held:
        own = self.words[first * self.rows : (first + 1) * self.rows, :_SUMS]
        open_slots = int((own.view(torch.float32)[:, _WEIGHT] > 0).sum())
        return Held(cdiv(int(own[0, _CURSOR]), self.rows), int(own[:, [_LENGTH, _NEAR]].sum()) + open_slots)

    def attend(self, layer: str, rows: Rows, request: Request, new: NewTokens) -> Tensor:
        """The next n tokens of one request in one layer: takes them in and returns their attention.

        Returns:
            [n, heads, head_dim] in the query's dtype; zeros for a request that was granted nothing: so vLLM warms up.

        Raises:
            RuntimeError: the request needs more cells than it was granted; the scheduler's bound was wrong.
        """
        if request.blocks[0] not in self.granted:
            return torch.zeros_like(new.query)
        with new.query.device:
            return self._attend(self.index[layer], rows, request, new)

    def _attend(self, layer: int, rows: Rows, request: Request, new: NewTokens) -> Tensor:
        n, _, d = new.query.shape
        heads, form = new.key.shape[1], rows.header
        w, seen = form.local_window, request.seen
        where = self._header_cells(request.blocks, layer)
        words = (
            self.words[where].flatten(1) if seen else self.words.new_zeros(heads, where.shape[1] * self.words.shape[1])
        )
        reals = words.view(torch.float32)
        length = words[:, _LENGTH].clone()
        sum_k, sum_v = reals[:, _SUMS : form.ring].clone().view(heads, 2, d).unbind(1)
        weight = reals[:, _WEIGHT].clone()

        def turned(x: Tensor, positions: Tensor) -> Tensor:
            cos, sin = (each.repeat(1, 2) for each in rows.angles[positions].float().chunk(2, dim=-1))
            x = rotate(x, cos, sin)
            if rows.clears_last_channel:
                x[..., -1] = 0
            return x

        # The ring and the new tokens, from position `base` on.
        pooled_before = base = max(seen - w, 0)
        ring = reals[:, form.ring : form.table].reshape(heads, w, 2 * d + 2)
        if seen > base:
            ring = ring[:, torch.arange(base, seen) % w]
        parts = new.key, new.value, new.alpha[..., None], new.omega[..., None]
        arriving = torch.cat([x.float() for x in parts], dim=-1).transpose(0, 1)
        tokens = torch.cat([ring[:, : seen - base], arriving], dim=1)
        k, v, alpha, omega = tokens[..., :d], tokens[..., d : 2 * d], tokens[..., -2] > 0, tokens[..., -1]
        position = torch.arange(base, seen + n)
        at = position[-n:, None]

        # Pooling of the m tokens that leave the ring.
        m = max(seen + n - w, 0) - pooled_before
        keys, values, masks, closing = [], [], [], []
        if m:
            start = ~alpha[:, :m]
            if pooled_before == 0:
                start[:, 0] = True
            segment = start.cumsum(1)
            same = (segment[:, :, None] == segment[:, None]).float().tril() * omega[:, None, :m]
            goes_on = (segment == 0).float()
            weights = same.sum(-1) + goes_on * weight[:, None]
            means = [
                (same @ x[:, :m] + goes_on[..., None] * total[:, None]) / weights[..., None]
                for x, total in ((k, sum_k), (v, sum_v))
            ]
            last = torch.zeros_like(start)
            last[:, :-1] = start[:, 1:]
            if pooled_before:  # the open slot of before, if the first token closes it
                keys.append(turned((sum_k / weight[:, None])[:, None], torch.tensor([pooled_before - 1])))
                values.append((sum_v / weight[:, None])[:, None])
                masks.append(start[:, None, :1].expand(-1, n, -1))
                closing.append(start[:, :1])
            due = at - w
            keys.append(turned(means[0], position[:m]))
            values.append(means[1])
            closing.append(last)
            masks.append((position[:m] == due) | (last[:, None] & (position[:m] < due)))
            sum_k, sum_v = (x[:, -1] * weights[:, -1:] for x in means)
            weight = weights[:, -1]
        shut_k, shut_v = (torch.cat(x, dim=1) if x else k[:, :0] for x in (keys, values))
        shut = torch.cat(closing, dim=1) if closing else alpha[:, :0]

        if w:
            keys.append(turned(k, position))
            values.append(v)
            masks.append(((position <= at) & (position > at - w)).expand(heads, -1, -1))
        table = words[:, form.table :]
        longest = int(length.max())
        if longest:
            page = torch.arange(cdiv(longest, self.page)).expand(heads, -1)
            filled = page * self.page < length[:, None]
            past = self.cells[torch.where(filled, table.gather(1, page), 0)].flatten(1, 2)[:, :longest].float()
            keys.append(past[..., :d])
            values.append(past[..., d:])
            masks.append((torch.arange(longest) < length[:, None])[:, None].expand(-1, n, -1))

        q = turned(new.query.float().transpose(0, 1), position[-n:]).view(heads, -1, n, d)
        scores = q @ torch.cat(keys, dim=1)[:, None].transpose(-1, -2) / math.sqrt(d)
        scores = scores.masked_fill(~torch.cat(masks, dim=-1)[:, None], -math.inf)
        # Masked values may be anything that was left in a cell: never NaN times zero.
        out = scores.softmax(-1) @ torch.cat(values, dim=1)[:, None].nan_to_num()

        # What has closed goes to pages; new cells are taken head after head.
        grown = length + shut.sum(1, dtype=torch.int32)
        pages = [(-(-x // self.page)).tolist() for x in (length, grown)]
        taken = sum(pages[1]) - sum(pages[0])
        cells = self._take(request.blocks[0], taken).split([b - a for a, b in zip(*pages, strict=True)])
        for h in range(heads):
            table[h, pages[0][h] : pages[1][h]] = cells[h].int()
            slot = torch.arange(int(length[h]), int(grown[h]))
            both = torch.cat([shut_k[h, shut[h]], shut_v[h, shut[h]]], dim=-1)
            self.cells[table[h, slot // self.page], slot % self.page] = both.to(self.cells.dtype)

        cursor = self.words[request.blocks[0] * self.rows, _CURSOR].clone()
        words[:, _LENGTH], words[:, _NEAR] = grown, min(seen + n, w)
        reals[:, _WEIGHT], reals[:, _SUMS : form.ring] = weight, torch.cat([sum_k, sum_v], dim=-1)
        if w:
            stays = torch.arange(max(seen + n - w, 0), seen + n)
            reals[:, form.ring : form.table].view(heads, w, -1)[:, stays % w] = tokens[:, stays - base]
        self.words[where] = words.view(heads, where.shape[1], -1)
        self.words[request.blocks[0] * self.rows, _CURSOR] = cursor
        return out.reshape(-1, n, d).transpose(0, 1).to(new.query.dtype)

    def _header_cells(self, blocks: list[int], layer: int) -> Tensor:
        """[heads, header blocks]"""
        base = torch.tensor(blocks) * self.rows + layer * self.heads
        return base[None] + torch.arange(self.heads)[:, None]

    def _take(self, first: int, count: int) -> Tensor:
        """The request's next ``count`` cells, in the order of its blocks."""
        blocks, cursor = self.granted[first], int(self.words[first * self.rows, _CURSOR])
        if cursor + count > len(blocks) * self.rows:
            raise RuntimeError(
                f"megatron-dmc: the request at block {first} needs {cursor + count} cells, its {len(blocks)} blocks have "
                f"{self.rows} each; this is an error of the plugin, please report it"
            )
        self.words[first * self.rows, _CURSOR] += count
        place = torch.arange(cursor, cursor + count)
        return torch.tensor([*blocks, 0])[place // self.rows] * self.rows + place % self.rows
