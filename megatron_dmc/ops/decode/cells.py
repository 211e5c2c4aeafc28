"""The memory of a layer's cache: one pool of cells, each a page of one row. Memory follows the sum of the rows' lengths."""

from typing import NamedTuple

import torch
from torch import Tensor


class Pages(NamedTuple):
    """Pages as one step reads them, in any order.

    Attributes:
        content: [pages, page_size, 2 * head_dim], keys and values side by side.
        hidden: bool [pages, page_size], slots that attention does not see.
        owner: int32 [pages], each page's row.
        place: int64 [pages], where in its row each stands: row * width + number.
        width: more than any number.
    """

    content: Tensor
    hidden: Tensor
    owner: Tensor
    place: Tensor
    width: int


# The pool grows by a 64th at least: a balance of unused memory and copies.
GROWTH = 64


class Cells:
    """Cells that rows own, in the order in which they were taken; a row's lists of them are its page table.

    No cell is given back by itself: rows only grow, or :meth:`select` chooses rows anew and packs their cells.

    Attributes:
        slots: [cells * page_size + 1, 2 * head_dim], keys and values side by side. The last one takes what nobody reads.
        hidden: bool, a slot each: attention does not see it.
        table: int32 [rows, most pages of a row], cells; only the first ``taken`` of a row count.
        taken: int64 [rows], pages.
        owner: int32 [cells in use], the row.
        place: int64 [cells in use], where the table names the cell, counted through all rows.
        used: cells in use: the first ones.
    """

    def __init__(self, rows: int, head_dim: int, page_size: int, *, like: Tensor):
        """Nothing yet, in like's dtype and on its device."""
        self.page_size = page_size
        self.used = 0
        self.slots = like.new_zeros(1, 2 * head_dim)
        self.hidden = torch.ones(1, dtype=torch.bool, device=like.device)
        self.table = torch.zeros(rows, 0, dtype=torch.int32, device=like.device)
        self.taken = torch.zeros(rows, dtype=torch.long, device=like.device)
        self.owner = torch.zeros(0, dtype=torch.int32, device=like.device)
        self.place = torch.zeros(0, dtype=torch.long, device=like.device)

    @property
    def nowhere(self) -> int:
        """The slot that takes what nobody reads."""
        return len(self.slots) - 1

    def pages(self) -> Pages:
        """All that are in use, as they lie in memory."""
        content, hidden = (
            x[: self.used * self.page_size].unflatten(0, (-1, self.page_size)) for x in (self.slots, self.hidden)
        )
        return Pages(content, hidden, self.owner, self.place, self.table.shape[1])

    def write(self, slot: Tensor, content: Tensor, *, visible: bool = True) -> None:
        """content [n, 2 * head_dim] in any dtype becomes that of slots [n], which attention sees from now on."""
        self.slots.index_copy_(0, slot, content.to(self.slots.dtype))
        if visible:
            self.hidden.index_fill_(0, slot, False)

    def make_room(self, length: Tensor) -> None:
        """Gives every row the cells for a list of ``length`` slots, int64 [rows]. Waits for the device."""
        pages = (length + self.page_size - 1) // self.page_size
        fresh = (pages - self.taken).clamp(min=0)
        end = fresh.cumsum(0)
        total, most = torch.stack([end[-1], pages.amax()]).tolist()
        if total == 0:
            return
        cell = self._take(fresh, total)
        if most > self.table.shape[1]:
            wider = self.table.new_zeros(len(self.table), most)
            wider[:, : self.table.shape[1]] = self.table
            self.table = wider
        row = torch.repeat_interleave(fresh, output_size=total)
        rank = torch.arange(total, device=row.device)
        self.table[row, self.taken[row] + rank - (end - fresh)[row]] = cell.int()
        self.taken = self.taken + fresh
        self._given_to(row)

    def _take(self, fresh: Tensor, total: int) -> Tensor:
        """The next cells, one row's after another's: fresh [rows] of them, ``total`` in all."""
        before, self.used = self.used, self.used + total
        self._grow()
        return torch.arange(before, self.used, device=fresh.device)

    def _given_to(self, row: Tensor) -> None:
        """The cells that were taken last are these rows'."""
        self.owner = torch.cat([self.owner, row.int()])
        self._find_places()

    def places(self, index: Tensor) -> Tensor:
        """Slots of the places ``index`` of the rows' lists, int64 [rows, n]; nowhere, where a row has no cell."""
        page = index.div(self.page_size, rounding_mode="floor")
        exists = (page >= 0) & (page < self.taken[:, None])
        if self.table.shape[1] == 0:
            return torch.full_like(index, self.nowhere)
        cell = self.table.gather(1, page.clamp(0, self.table.shape[1] - 1)).long()
        return torch.where(exists, cell * self.page_size + index % self.page_size, self.nowhere)

    def dense(self) -> Tensor:
        """The rows' lists as a temporary, [rows, slots, 2 * head_dim]; any slot's content where a row has fewer."""
        return self.slots[: self.nowhere].unflatten(0, (-1, self.page_size))[self.table].flatten(1, 2)

    def select(self, row: Tensor) -> None:
        """Row i becomes what row[i] was; the cells of rows that are not named are freed."""
        taken = self.taken[row]
        end = taken.cumsum(0)
        used, most = torch.stack([end[-1], taken.amax()]).tolist()
        owner = torch.repeat_interleave(taken, output_size=used)
        rank = torch.arange(used, device=row.device)
        page = rank - (end - taken)[owner]
        cell = self.table[row[owner], page]
        pages, hidden = (x[cell] for x in self.pages()[:2])
        self.slots = torch.cat([pages.flatten(0, 1), self.slots[-1:]])
        self.hidden = torch.cat([hidden.flatten(), self.hidden[-1:]])
        self.table = self.table.new_zeros(len(row), most)
        self.table[owner, page] = rank.int()
        self.owner, self.taken, self.used = owner.int(), taken, used
        self._find_places()

    def _grow(self) -> None:
        needed, capacity = self.used * self.page_size, len(self.slots) - 1
        if needed <= capacity:
            return
        extra = max(needed, capacity + capacity // GROWTH // self.page_size * self.page_size) - capacity
        # Zeros, not uninitialized memory: a slot that nobody has written has weight 0, and 0 * NaN is NaN.
        self.slots = torch.cat([self.slots, self.slots.new_zeros(extra, self.slots.shape[1])])
        self.hidden = torch.cat([self.hidden, torch.ones_like(self.hidden[:1]).expand(extra)])
        # What was the last slot may hold anything.
        self.slots[capacity] = 0
        self.hidden[capacity] = True

    def _find_places(self) -> None:
        width = self.table.shape[1]
        page = torch.arange(width, device=self.table.device)
        exists = page < self.taken[:, None]
        where = torch.arange(exists.numel(), device=page.device).view_as(exists)
        self.place = torch.empty(self.used, dtype=torch.long, device=page.device)
        self.place[self.table[exists].long()] = where[exists]
