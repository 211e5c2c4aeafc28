"""The decode cache of ``ops/decode`` in blocks that vLLM owns: some requests' rows of one layer, for one call."""

import torch
from torch import Tensor

from megatron_dmc.ops.decode.ahead import Ahead, Pages
from megatron_dmc.ops.decode.cells import Cells, CodedCells, NearCells
from megatron_dmc.ops.decode.codes import Codes
from megatron_dmc.ops.decode.memory import Grants
from megatron_dmc.ops.decode.rows import Rows
from megatron_dmc.serving import kernels
from megatron_dmc.serving.header import KEPT, Header


class _Granted(Cells):
    """Cells of vLLM's blocks.

    Granted blocks hold zeros at first: a slot that nobody has written has weight 0, and 0 * NaN is NaN.
    """

    # Of vLLM's null block, which no request has.
    unread = 0

    def __init__(self, slots: Tensor, table: Tensor, taken: Tensor, page_size: int, grants: Grants, places: Tensor):
        """slots: of all blocks; table: the rows' page tables, where they are to be kept; places: of the requests among the
        grants, int64 [requests]."""
        self.slots, self.whole_table, self.taken, self.page_size = slots, table, taken, page_size
        self.grants, self.requests = grants, places
        self.used = len(slots) // page_size
        self._cut()

    def make_room(self, length: Tensor) -> None:
        self.table = self.whole_table
        super().make_room(length)
        self._cut()

    def finish(self) -> None:
        """After a call. What nobody reads is read with weight 0 where a row has fewer pages than others: a NaN of one request
        would become everybody's."""
        self.slots[self.unread].zero_()

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


class EngineCells(_Granted):
    """slots: [slots, 2 * head_dim]."""


class EngineCodedCells(_Granted, CodedCells):
    """slots: uint8 [slots, bytes of a slot]. The rows' first pages hold the ring and the reserved places; what CodedCells has
    beside its cells is a copy."""

    def __init__(
        self,
        slots: Tensor,
        table: Tensor,
        taken: Tensor,
        page_size: int,
        grants: Grants,
        places: Tensor,
        *,
        near: NearCells,
        codes: Codes,
        begins: Tensor,
    ):
        """begins: bool [rows], those that have no pages yet."""
        self.codes, self.base, self.near_cells = codes, near.places, near
        self.near_table = table[:, : near.cells]
        super().__init__(slots, table[:, near.cells :], taken, page_size, grants, places)
        fresh = begins * near.cells
        if total := int(fresh.sum()):
            self.near_table[begins] = self._take(fresh, total).view(-1, near.cells).int()
        content = self._near_pages()[self.near_table.clamp(min=0)].flatten(1, 2)[:, : self.base]
        # Of a row that begins they hold what somebody has left there, if its blocks are not all granted.
        content = content.masked_fill(begins[:, None, None], 0).flatten(0, 1)
        self.near = torch.cat([content, content.new_zeros(1, content.shape[1])])

    def finish(self) -> None:
        near, rows = self.near_cells, len(self.near_table)
        places = self.near.new_zeros(rows, near.cells * near.per_cell, self.near.shape[1])
        places[:, : self.base] = self.near[:-1].unflatten(0, (rows, self.base))
        self._near_pages()[self.near_table.clamp(min=0)] = places.unflatten(1, (near.cells, near.per_cell))
        super().finish()
        self._near_pages()[0] = 0

    def _near_pages(self) -> Tensor:
        """All cells as if they held keys and values as they are: [cells, per_cell, 2 * head_dim], a view."""
        near, width = self.near_cells, 2 * self.codes.head_dim
        used = near.per_cell * width * near.dtype.itemsize
        return self.slots.view(self.used, -1)[:, :used].view(near.dtype).unflatten(1, (near.per_cell, width))


class EngineRows(Rows):
    """Requests' rows, copied out of their headers.

    Args:
        header: where in a row's words what lies.
        words: int32 [requests, kv_heads, words], a copy; of a new request zeros.
        seen: tokens before the call, int64 [requests].
        slots: of all blocks, as WorkerCache has them.
        grants: of all requests.
        places: of these requests among them, int64 [requests].
    """

    def __init__(self, header: Header, words: Tensor, seen: Tensor, slots: Tensor, *, grants: Grants, places: Tensor):
        self.layout, self.head_dim, self.header, self.seen = header.layout, header.head_dim, header, seen
        chosen = kernels.of(header, slots.device.type)
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
        table, length = self.words[:, header.table], self.lengths(self.kept, seen)
        near, codes = header.near, header.layout.codes(header.head_dim)
        if near is None or codes is None:
            self.cells: EngineCells | EngineCodedCells = EngineCells(
                slots, table, (length + size - 1) // size, size, grants, places
            )
        else:
            taken = ((length - near.places).clamp(min=0) + size - 1) // size
            begins = (seen == 0).repeat_interleave(self.kv_heads)
            self.cells = EngineCodedCells(
                slots, table, taken, size, grants, places, near=near, codes=codes, begins=begins
            )
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
        self.cells.finish()
        return self.words.unflatten(0, (self.batch, self.kv_heads))
