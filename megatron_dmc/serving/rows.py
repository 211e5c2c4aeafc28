"""The decode cache of ``ops/decode`` in blocks that vLLM owns: some requests' rows of one layer, for one call."""

import torch
from torch import Tensor

from megatron_dmc.ops.decode.ahead import Ahead, Pages
from megatron_dmc.ops.decode.cells import Cells
from megatron_dmc.ops.decode.memory import Grants
from megatron_dmc.ops.decode.rows import Rows
from megatron_dmc.serving import kernels
from megatron_dmc.serving.header import KEPT, Header


class EngineCells(Cells):
    """Cells of vLLM's blocks.

    Granted blocks hold zeros at first: a slot that nobody has written has weight 0, and 0 * NaN is NaN.
    """

    # vLLM's null block, which no request has.
    nowhere = 0

    def __init__(self, slots: Tensor, table: Tensor, taken: Tensor, page_size: int, grants: Grants, places: Tensor):
        """slots: of all blocks, [slots, 2 * head_dim]; table: the rows' page tables, where they are to be kept; places: of the
        requests among the grants, int64 [requests]."""
        self.slots, self.whole_table, self.taken, self.page_size = slots, table, taken, page_size
        self.grants, self.requests = grants, places
        self.used = len(slots) // page_size
        self._cut()

    def dense(self) -> Tensor:
        return self.slots.unflatten(0, (-1, self.page_size))[self.table].flatten(1, 2)

    def make_room(self, length: Tensor) -> None:
        self.table = self.whole_table
        super().make_room(length)
        self._cut()

    def _take(self, fresh: Tensor, total: int) -> Tensor:
        """In the null block, if the grants are used up; the report tells of it."""
        grants, at = self.grants, self.requests
        counts = fresh.unflatten(0, (len(at), -1)).sum(1)
        cursor, limit = grants.cursor[at].long(), grants.granted[at].long() * grants.cells_per_block
        request = torch.repeat_interleave(counts, output_size=total)
        number = (cursor - counts.cumsum(0) + counts)[request] + torch.arange(total, device=fresh.device)
        grants.cursor.index_copy_(0, at, torch.minimum(cursor + counts, limit).int())
        grants.overflow.index_add_(0, at, (cursor + counts > limit).int())
        block, cell = number // grants.cells_per_block, number % grants.cells_per_block
        block = grants.blocks[at[request], block.clamp(max=grants.blocks.shape[1] - 1)]
        return torch.where(number < limit[request], block * grants.cells_per_block + cell, 0)

    def _cut(self) -> None:
        """Only the pages that some row has are looked at. Where others have fewer, kernels leave what was there before."""
        pages = torch.arange(int(self.taken.amax()), device=self.taken.device)
        beyond = pages >= self.taken[:, None]
        self.table = self.whole_table[:, : len(pages)].masked_fill(beyond, 0).clamp_(min=0)


class EngineRows(Rows):
    """Requests' rows, copied out of their headers.

    Args:
        header: where in a row's words what lies.
        words: int32 [requests, kv_heads, words], a copy; of a new request zeros.
        seen: tokens before the call, int64 [requests].
        slots: of all blocks, [slots, 2 * head_dim].
        grants: of all requests.
        places: of these requests among them, int64 [requests].
    """

    def __init__(self, header: Header, words: Tensor, seen: Tensor, slots: Tensor, *, grants: Grants, places: Tensor):
        self.layout, self.head_dim, self.header, self.seen = header.layout, header.head_dim, header, seen
        chosen = kernels.of(header, slots.dtype, slots.device.type)
        self.form = "torch" if chosen is None else chosen.name
        self.batch, self.kv_heads = words.shape[:2]
        self._appends = torch.empty(words.shape[:2], dtype=torch.bool, device=words.device)
        self.words = words.flatten(0, 1)
        reals = self.words.view(torch.float32)
        self.kept = self.words[:, KEPT].long()
        self.sums, self.decisions, self.recent = (
            reals[:, part] if part.stop > part.start else None
            for part in (header.sums, header.decisions, header.recent)
        )
        # Kernels leave what they do not read as it was.
        if self.sums is not None:
            nothing = self.kept == 0
            self.sums.masked_fill_(nothing[:, None], 0)
            self.sums[:, -1].masked_fill_(nothing, int(self.layout.merges))
        if self.decisions is not None:
            place = torch.arange(self.layout.local_window, device=seen.device)
            self.decisions.masked_fill_((place >= seen[:, None]).repeat_interleave(self.kv_heads, dim=0), 0)
        size = self.layout.page_size
        taken = (self.lengths(self.kept, seen) + size - 1) // size
        self.cells = EngineCells(slots, self.words[:, header.table], taken, size, grants, places)
        self.ahead = None
        self.steps = 0

    @property
    def appends(self) -> Tensor:
        return self._appends

    def open_pages(self) -> Ahead:
        appends = self.appends.flatten()
        self.cells.make_room(self.lengths(self.kept + appends, self.seen + 1))
        self.ahead = Ahead(self.layout, self.cells, self.kept, self.seen.repeat_interleave(self.kv_heads), 1)
        self.ahead.moves[:, 0] = appends
        return self.ahead

    def pages(self, target: Tensor) -> Pages:
        """A copy: the pages of these rows lie among all others'."""
        cells, size = self.cells, self.layout.page_size
        row, number, cell = cells.named()
        # Faster by far than indexing: a page is copied as a whole. After them the null block's.
        cell = torch.cat([cell, cell.new_zeros(1)])
        owner = torch.cat([row, row.new_full((1,), len(self.kept))])
        content = cells.slots.view(-1, size * cells.slots.shape[1]).index_select(0, cell).view(len(cell), size, -1)
        content[-1] = 0
        bias = self.bias_of(row, number, self.count.flatten(), self.seen + 1)
        bias = torch.cat([bias, bias.new_full((1, size), float("-inf"))])
        return Pages.of(content, bias, owner, row * cells.table.shape[1] + number, cells.table)

    def finished(self) -> Tensor:
        """The words as they are after the call, [requests, kv_heads, words]."""
        self.settle()
        self.words[:, KEPT] = self.kept.int()
        # Read with weight 0 where a row has fewer pages than others: a NaN of one request would become everybody's.
        self.cells.slots[self.cells.nowhere].zero_()
        return self.words.unflatten(0, (self.batch, self.kv_heads))
