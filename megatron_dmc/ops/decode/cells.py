"""The memory of a layer's cache: one pool of cells, each a page of one row. Memory follows the sum of the rows' lengths."""

from dataclasses import dataclass

import torch
from torch import Tensor

from megatron_dmc.ops.decode.codes import Codes
from megatron_dmc.ops.decode.layout import Layout

# The pool grows by a 64th at least: a balance of unused memory and copies.
GROWTH = 64


class Cells:
    """Cells that rows own, in the order in which they were taken; a row's lists of them are its page table.

    No cell is given back by itself: rows only grow, or :meth:`select` chooses rows anew and packs their cells.

    Attributes:
        slots: [cells * page_size + 1, 2 * head_dim], keys and values side by side. The last one takes what nobody reads.
        table: int32 [rows, most pages of a row], cells; only the first ``taken`` of a row count.
        taken: int64 [rows], pages.
        used: cells in use: the first ones.
    """

    # Places of a row's list that lie beside its cells.
    base = 0

    def __init__(self, rows: int, head_dim: int, page_size: int, *, like: Tensor):
        """Nothing yet, in like's dtype and on its device."""
        self.page_size = page_size
        self.used = 0
        self.slots = like.new_zeros(1, 2 * head_dim)
        self.table = torch.zeros(rows, 0, dtype=torch.int32, device=like.device)
        self.taken = torch.zeros(rows, dtype=torch.long, device=like.device)

    @property
    def unread(self) -> int:
        """Which of ``slots`` takes what nobody reads."""
        return len(self.slots) - 1

    @property
    def nowhere(self) -> int:
        """The slot that takes what nobody reads, as slots are numbered."""
        return self.unread

    @property
    def dtype(self) -> torch.dtype:
        """Of what is read."""
        return self.slots.dtype

    @property
    def head_dim(self) -> int:
        return self.slots.shape[1] // 2

    def read(self, slot: Tensor) -> Tensor:
        """The content of slots [...] of the ring or reserved places: [..., 2 * head_dim]."""
        return self.slots.index_select(0, slot.flatten()).view(*slot.shape, 2 * self.head_dim)

    def first(self, cells: int) -> Tensor:
        """The content of that many, used or not: [cells, page_size, 2 * head_dim]."""
        self._grow(cells)
        return self.slots[: cells * self.page_size].unflatten(0, (cells, self.page_size))

    def named(self) -> tuple[Tensor, Tensor, Tensor]:
        """Of all that are in use, row by row: the row, the number of its page, and the cell, each int64 [used]."""
        number = torch.arange(self.table.shape[1], device=self.taken.device)
        row, number = (number < self.taken[:, None]).nonzero(as_tuple=True)
        return row, number, self.table[row, number].long()

    def write(self, slot: Tensor, content: Tensor) -> None:
        """content [n, 2 * head_dim] in any dtype becomes that of slots [n]."""
        self.slots.index_copy_(0, slot, content.to(self.slots.dtype))

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

    def _take(self, fresh: Tensor, total: int) -> Tensor:
        """The next cells, one row's after another's: fresh [rows] of them, ``total`` in all."""
        self._grow(self.used + total)
        before, self.used = self.used, self.used + total
        return torch.arange(before, self.used, device=fresh.device)

    def places(self, index: Tensor) -> Tensor:
        """Slots of the places ``index`` of the rows' lists, int64 [rows, n]; nowhere, where a row has no cell."""
        page = index.div(self.page_size, rounding_mode="floor")
        exists = (page >= 0) & (page < self.taken[:, None])
        if self.table.shape[1] == 0:
            return torch.full_like(index, self.unread)
        cell = self.table.gather(1, page.clamp(0, self.table.shape[1] - 1)).long()
        return torch.where(exists, cell * self.page_size + index % self.page_size, self.unread)

    def at(self, row: Tensor, index: Tensor) -> Tensor:
        """Slots of the places ``index`` of rows' lists, int64 [n], beyond the layout's base; they have cells for them."""
        return self.table[row, index // self.page_size].long() * self.page_size + index % self.page_size

    def dense(self) -> Tensor:
        """The rows' lists as a temporary, [rows, slots, 2 * head_dim]; any slot's content where a row has fewer. Codes are
        given back in float32 or wider."""
        return self.paged()[self.table].flatten(1, 2)

    def paged(self) -> Tensor:
        """All cells, [cells, page_size, ...]."""
        return self.slots[: len(self.slots) // self.page_size * self.page_size].unflatten(0, (-1, self.page_size))

    def select(self, row: Tensor) -> None:
        """Row i becomes what row[i] was; the cells of rows that are not named are freed."""
        taken = self.taken[row]
        end = taken.cumsum(0)
        used, most = torch.stack([end[-1], taken.amax()]).tolist()
        owner = torch.repeat_interleave(taken, output_size=used)
        rank = torch.arange(used, device=row.device)
        page = rank - (end - taken)[owner]
        cell = self.table[row[owner], page]
        self.slots = torch.cat([self.first(self.used)[cell].flatten(0, 1), self.slots[-1:]])
        self.table = self.table.new_zeros(len(row), most)
        self.table[owner, page] = rank.int()
        self.taken, self.used = taken, used

    def _grow(self, cells: int) -> None:
        needed, capacity = cells * self.page_size, len(self.slots) - 1
        if needed <= capacity:
            return
        extra = max(needed, capacity + capacity // GROWTH // self.page_size * self.page_size) - capacity
        # Zeros, not uninitialized memory: a slot that nobody has written has weight 0, and 0 * NaN is NaN.
        self.slots = torch.cat([self.slots, self.slots.new_zeros(extra, self.slots.shape[1])])
        # What was the last slot may hold anything.
        self.slots[capacity] = 0


@dataclass(frozen=True)
class NearCells:
    """How cells of codes hold a row's ring and reserved places where there is no other memory: in its first cells as they are.

    Attributes:
        places: of a row, the layout's base.
        per_cell: as many fit into a cell.
        dtype: of keys and values.
    """

    places: int
    per_cell: int
    dtype: torch.dtype

    @classmethod
    def of(cls, layout: Layout, head_dim: int, dtype: torch.dtype) -> "NearCells | None":
        """None: cells are not of codes, and a row's list begins with these places.

        Raises:
            ValueError: a cell is smaller than a slot that is no code.
        """
        if (codes := layout.codes(head_dim)) is None:
            return None
        slot_bytes = 2 * head_dim * dtype.itemsize
        per_cell = layout.page_size * codes.slot_bytes // slot_bytes
        if not per_cell:
            raise ValueError(
                f"pages of {layout.page_size} slots in {layout.cache_dtype} are too small for one in {dtype}"
            )
        return cls(layout.base, per_cell, dtype)

    @property
    def cells(self) -> int:
        """Of a row."""
        return -(-self.places // self.per_cell)


class CodedCells(Cells):
    """Cells of codes, in which rows keep the slots from the layout's base on. What comes before lies beside them as it is.

    Slots are numbered through: those beside the cells first, row by row.

    Attributes:
        near: [rows * base + 1, 2 * head_dim], the ring and the reserved places of all rows. The last one takes what nobody
            reads.
        slots: uint8 [cells * page_size + 1, bytes of a slot].
        table, taken: of the places from base on.
    """

    def __init__(self, rows: int, base: int, codes: Codes, page_size: int, *, like: Tensor):
        """As Cells'. base: places of a row that lie beside the cells."""
        super().__init__(rows, codes.head_dim, page_size, like=like)
        self.codes, self.base = codes, base
        self.near = like.new_zeros(rows * base + 1, 2 * codes.head_dim)
        self.slots = torch.zeros(1, codes.slot_bytes, dtype=torch.uint8, device=like.device)

    @property
    def head_dim(self) -> int:
        return self.codes.head_dim

    @property
    def beside(self) -> int:
        """How many slots lie beside the cells."""
        return len(self.near) - 1

    @property
    def nowhere(self) -> int:
        return self.beside + self.unread

    @property
    def dtype(self) -> torch.dtype:
        return self.near.dtype

    def read(self, slot: Tensor) -> Tensor:
        return self.near.index_select(0, slot.flatten().clamp(max=self.beside)).view(*slot.shape, 2 * self.head_dim)

    def write(self, slot: Tensor, content: Tensor) -> None:
        self.near.index_copy_(0, slot.clamp(max=self.beside), content.to(self.near.dtype))
        coded = slot - self.beside
        coded = torch.where(coded >= 0, coded, self.unread)
        self.slots.index_copy_(0, coded, self.codes.encode(content))

    def make_room(self, length: Tensor) -> None:
        super().make_room((length - self.base).clamp(min=0))

    def places(self, index: Tensor) -> Tensor:
        row = torch.arange(len(index), device=index.device)[:, None]
        beside = (index >= 0) & (index < self.base)
        # Before the first place there is none.
        coded = super().places(torch.where(index >= self.base, index - self.base, -1))
        return torch.where(beside, row * self.base + index, coded + self.beside)

    def at(self, row: Tensor, index: Tensor) -> Tensor:
        return self.beside + super().at(row, index - self.base)

    def dense(self) -> Tensor:
        wide = torch.promote_types(self.dtype, torch.float32)
        codes = self.paged()[self.table].flatten(1, 2)
        near = self.near[:-1].unflatten(0, (len(self.table), self.base))
        return torch.cat([near.to(wide), self.codes.decode(codes, wide)], dim=1)

    def select(self, row: Tensor) -> None:
        chosen = self.near[:-1].unflatten(0, (len(self.table), self.base))[row]
        self.near = torch.cat([chosen.flatten(0, 1), self.near[-1:]])
        super().select(row)
