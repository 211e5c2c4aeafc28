"""The decode cache of ``ops/decode`` in blocks that vLLM owns: some requests' rows of one layer, for one call."""

from collections.abc import Sequence
from dataclasses import dataclass, field

import torch
from torch import Tensor

from megatron_dmc.ops.decode.cells import Cells, Pages
from megatron_dmc.ops.decode.rows import Rows
from megatron_dmc.ops.decode.sequences import Step
from megatron_dmc.serving.header import KEPT, SEEN, Header


@dataclass
class Grant:
    """Blocks that a request may take cells of, in the order of the list.

    Attributes:
        rows: cells of a block.
        taken: cells taken so far, by all layers and heads.
    """

    rows: int
    blocks: list[int] = field(default_factory=list)
    taken: int = 0

    def take(self, count: int) -> list[int]:
        """Raises RuntimeError if the request needs more than it was granted: the scheduler's bound was wrong."""
        places = range(self.taken, self.taken + count)
        if count and places[-1] >= len(self.blocks) * self.rows:
            raise RuntimeError(
                f"megatron-dmc: a request needs {places[-1] + 1} cells, its {len(self.blocks)} blocks have {self.rows} each; "
                "this is an error of the plugin, please report it"
            )
        self.taken += count
        return [self.blocks[place // self.rows] * self.rows + place % self.rows for place in places]


class EngineCells(Cells):
    """Cells of vLLM's blocks. What is hidden follows from the rows' lengths and is not kept."""

    # vLLM's null block, which no request has.
    nowhere = 0

    def __init__(self, slots: Tensor, table: Tensor, taken: Tensor, page_size: int, grants: Sequence[Grant]):
        """slots: of all blocks, [slots, 2 * head_dim]; table: the rows' page tables, where they are to be kept."""
        self.slots, self.whole_table, self.taken, self.page_size, self.grants = slots, table, taken, page_size, grants
        self._cut()

    def write(self, slot: Tensor, content: Tensor, *, visible: bool = True) -> None:
        self.slots.index_copy_(0, slot, content.to(self.slots.dtype))

    def dense(self) -> Tensor:
        return self.slots.unflatten(0, (-1, self.page_size))[self.table].flatten(1, 2)

    def make_room(self, length: Tensor) -> None:
        self.table = self.whole_table
        super().make_room(length)
        self._cut()

    def _take(self, fresh: Tensor, total: int) -> Tensor:
        counts = fresh.unflatten(0, (len(self.grants), -1)).sum(1).tolist()
        taken = [cell for grant, count in zip(self.grants, counts, strict=True) for cell in grant.take(count)]
        cell = torch.tensor(taken, device=fresh.device)
        # They may hold what was a header, NaN as a number; a slot that nobody has written has weight 0, and 0 * NaN is NaN.
        self.slots.unflatten(0, (-1, self.page_size)).index_fill_(0, cell, 0)
        return cell

    def _given_to(self, row: Tensor) -> None:
        pass

    def _cut(self) -> None:
        """Only the pages that some row has are looked at."""
        self.table = self.whole_table[:, : int(self.taken.amax())]


class EngineRows(Rows):
    """Requests' rows, copied out of their headers.

    Args:
        header: where in a row's words what lies.
        words: int32 [requests, kv_heads, words], a copy; of a new request zeros.
        seen: tokens before the call, int64 [requests].
        slots: of all blocks, [slots, 2 * head_dim].
        grants: the requests'.
    """

    def __init__(self, header: Header, words: Tensor, seen: Tensor, slots: Tensor, grants: Sequence[Grant]):
        self.layout, self.head_dim, self.header, self.seen = header.layout, header.head_dim, header, seen
        self.batch, self.kv_heads = words.shape[:2]
        self.words = words.flatten(0, 1)
        reals = self.words.view(torch.float32)
        self.kept = self.words[:, KEPT].long()
        self.sums, self.decisions, self.recent = (
            reals[:, part] if part.stop > part.start else None
            for part in (header.sums, header.decisions, header.recent)
        )
        if self.sums is not None and self.layout.merges:
            # Nothing divides by zero.
            self.sums[:, -1].masked_fill_((seen == 0).repeat_interleave(self.kv_heads), 1)
        size = self.layout.page_size
        taken = (self.lengths(self.kept, seen) + size - 1) // size
        self.cells = EngineCells(slots, self.words[:, header.table :], taken, size, grants)
        self.column = self.kept.new_zeros(len(self.kept), self.layout.written_at_once)
        self.ahead = self.kept.new_zeros(len(self.kept), 0)
        self.steps = 0

    def open_pages(self, appends: Tensor, call: Step) -> None:
        self.cells.make_room(self.lengths(self.kept + appends.flatten(), self.seen + 1))
        self.look_ahead(1)

    def pages(self, call: Step) -> Pages:
        """A copy: the pages of these rows lie among all others'."""
        cells, size = self.cells, self.layout.page_size
        width = cells.table.shape[1]
        number = torch.arange(width, device=self.kept.device)
        row, number = (number < cells.taken[:, None]).nonzero(as_tuple=True)
        # Faster by far than indexing: a page is copied as a whole.
        content = cells.slots.view(-1, size * cells.slots.shape[1]).index_select(0, cells.table[row, number])
        index = number[:, None] * size + torch.arange(size, device=number.device)
        hidden = index >= self.lengths(self.count.flatten(), self.seen + 1)[row][:, None]
        if self.recent is not None:
            hidden |= (index >= self.layout.local_window) & (index < self.layout.base)
        return Pages(content.view(len(row), size, -1), hidden, row.int(), row * width + number, width)

    def finished(self, new: Tensor | int) -> Tensor:
        """The words as they are after ``new`` tokens of every request, [requests, kv_heads, words]."""
        self.settle()
        self.words[:, KEPT] = self.kept.int()
        self.words[:, SEEN] = (self.seen + new).repeat_interleave(self.kv_heads).int()
        return self.words.unflatten(0, (self.batch, self.kv_heads))
