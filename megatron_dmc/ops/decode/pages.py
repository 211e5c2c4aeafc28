"""Closed slots of all (sequence, KV head) rows in one pool of small pages: memory follows the sum of the lengths."""

from collections.abc import Sequence
from typing import NamedTuple

import torch
from torch import Tensor

from megatron_dmc.ops.attention.flash import HIDDEN
from megatron_dmc.ops.matrix_product import matrix_product


class Nearby(NamedTuple):
    """Slots that a row has beside its pages.

    Attributes:
        key, value: [rows, slots, head_dim], the key rotated.
        bias: [rows, slots] in float32 or wider, added to every query's score; -inf at places that hold nothing.
    """

    key: Tensor
    value: Tensor
    bias: Tensor

    @classmethod
    def unless(cls, hidden: Tensor, key: Tensor, value: Tensor) -> "Nearby":
        """Slots without a bias; ``hidden``, bool [rows, slots], marks places that hold nothing."""
        wide = torch.promote_types(key.dtype, torch.float32)
        bias = torch.zeros(hidden.shape, dtype=wide, device=hidden.device).masked_fill_(hidden, float("-inf"))
        return cls(key, value, bias)


class Pages:
    """A growing pool of pages. One row owns each page and fills it from its start.

    No page is freed by itself: rows only grow, or :meth:`select` chooses rows anew and packs their pages. So the pages in use
    are the first ``used`` ones, a row's pages are in the order of their slots, and only its last page has room.
    """

    GROWTH = 16  # the pool grows by 1/16: a balance of unused memory and copies

    def __init__(self, rows: int, head_dim: int, page_size: int, dtype: torch.dtype, device: torch.device):
        self.page_size = page_size
        self.used = 0
        self.keys = torch.zeros(0, page_size, head_dim, dtype=dtype, device=device)
        self.values = torch.zeros_like(self.keys)
        self.owner = torch.zeros(0, dtype=torch.long, device=device)  # [pages], the row
        self.fill = torch.zeros(0, dtype=torch.long, device=device)  # [pages], slots written
        self.lengths = torch.zeros(rows, dtype=torch.long, device=device)
        self.last_page = torch.zeros(rows, dtype=torch.long, device=device)

    def append(self, row: Tensor, key: Tensor, value: Tensor) -> None:
        """Adds slots. row [n], ascending, the slots of a row in order; key (rotated) and value [n, head_dim]."""
        if len(row) == 0:
            return
        ones = torch.ones_like(row)
        added = torch.zeros_like(self.lengths).index_add_(0, row, ones)
        pages_before = self._page_count(self.lengths)
        fresh = self._page_count(self.lengths + added) - pages_before
        fresh_end = self.used + fresh.cumsum(0)
        used = int(fresh_end[-1])
        self._reserve(used)
        self.owner[self.used : used] = torch.repeat_interleave(fresh, output_size=used - self.used)

        rank = torch.arange(len(row), device=row.device) - (added.cumsum(0) - added)[row]
        place = self.lengths[row] + rank
        ordinal = place // self.page_size - pages_before[row]  # among the fresh pages; -1: the page that still has room
        page = torch.where(ordinal < 0, self.last_page[row], (fresh_end - fresh)[row] + ordinal)
        self.keys[page, place % self.page_size] = key
        self.values[page, place % self.page_size] = value
        self.fill.index_add_(0, page, ones)
        self.last_page = torch.where(fresh > 0, fresh_end - 1, self.last_page)
        self.lengths = self.lengths + added
        self.used = used

    def attend(self, query: Tensor, nearby: Sequence[Nearby], softmax_scale: float) -> Tensor:
        """One query per head over its row's slots; pages are the splits of a flash-decoding step.

        Args:
            query: [rows, group, head_dim], rotated.
            nearby: what else a row sees, at least one slot.

        Returns:
            [rows, group, head_dim], float32 or wider.
        """
        owner, fill = self.owner[: self.used], self.fill[: self.used]
        scores = _product(query[owner], self.keys[: self.used].mT) * softmax_scale  # [pages, group, page_size]
        empty = torch.arange(self.page_size, device=fill.device) >= fill[:, None]
        scores.masked_fill_(empty[:, None], float("-inf"))
        near = [
            _product(query, key.mT) * softmax_scale + bias[:, None] for key, _, bias in nearby
        ]  # [rows, group, slots]

        peak = torch.cat([each.amax(-1, keepdim=True) for each in near], dim=-1).amax(-1)
        peak = peak.scatter_reduce(0, owner[:, None].expand(-1, query.shape[1]), scores.amax(-1), "amax")
        weights = torch.exp(scores - peak[owner][..., None])
        near = [torch.exp(each - peak[..., None]) for each in near]
        total = torch.cat([each.sum(-1, keepdim=True) for each in near], dim=-1).sum(-1)
        total = total.index_add(0, owner, weights.sum(-1))
        parts = [_product(w.to(value.dtype), value) for w, (_, value, _) in zip(near, nearby, strict=True)]
        out = sum(parts[1:], start=parts[0])
        out.index_add_(0, owner, _product(weights.to(self.values.dtype), self.values[: self.used]))
        return out / total[..., None]

    def padded(self) -> tuple[Tensor, Tensor, Tensor]:
        """A dense temporary: keys, values [rows, longest, head_dim]; bias [rows, longest], HIDDEN where no slot is."""
        count = self._page_count(self.lengths)
        ordinal = torch.arange(int(count.max()), device=count.device)
        exists = ordinal < count[:, None]
        by_row = self.owner[: self.used].argsort(stable=True)
        first = (count.cumsum(0) - count)[:, None]
        page = by_row[torch.where(exists, first + ordinal, 0)]  # [rows, most pages of a row]
        slot = torch.arange(self.page_size, device=count.device)
        visible = (slot < self.fill[page][..., None]) & exists[..., None]
        bias = torch.zeros_like(visible, dtype=torch.float32).masked_fill_(~visible, HIDDEN)
        return self.keys[page].flatten(1, 2), self.values[page].flatten(1, 2), bias.flatten(1, 2)

    def select(self, row: Tensor) -> None:
        """Row i becomes what row[i] was; the pages of rows that are not named are freed."""
        count = self._page_count(self.lengths)
        by_row = self.owner[: self.used].argsort(stable=True)
        first = (count.cumsum(0) - count)[row]
        count = count[row]
        end = count.cumsum(0)
        self.used = int(end[-1])
        self.owner = torch.repeat_interleave(count, output_size=self.used)
        rank = torch.arange(self.used, device=row.device) - (end - count)[self.owner]
        page = by_row[first[self.owner] + rank]
        self.keys, self.values, self.fill = self.keys[page], self.values[page], self.fill[page]
        self.lengths, self.last_page = self.lengths[row], end - 1

    def tensors(self) -> list[Tensor]:
        return [self.keys, self.values, self.owner, self.fill, self.lengths, self.last_page]

    def _page_count(self, lengths: Tensor) -> Tensor:
        return (lengths + self.page_size - 1) // self.page_size

    def _reserve(self, pages: int) -> None:
        capacity = len(self.owner)
        if pages <= capacity:
            return
        extra = max(pages, capacity + capacity // self.GROWTH) - capacity
        # Zeros, not uninitialized memory: an unwritten slot has weight 0, and 0 * NaN is NaN.
        for name in ("keys", "values", "owner", "fill"):
            pool = getattr(self, name)
            setattr(self, name, torch.cat([pool, pool.new_zeros(extra, *pool.shape[1:])]))


def _product(a: Tensor, b: Tensor) -> Tensor:
    """Batched a @ b in float32 or wider. Scores rounded to bf16 would be off by much more than the keys are."""
    if a.is_cuda and a.dtype in (torch.bfloat16, torch.float16):
        return torch.bmm(a, b, out_dtype=torch.float32)
    wide = torch.promote_types(a.dtype, torch.float32)
    return matrix_product(a.to(wide), b.to(wide))
