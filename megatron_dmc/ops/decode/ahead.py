"""What a step by torch's operations reads beside the state: where it writes, and what attention adds to scores.

All of it follows from the state; it is made for some steps at once, and goes when anything else changes the rows.
"""

from dataclasses import dataclass

import torch
from torch import Tensor

from megatron_dmc.ops.decode.cells import Cells
from megatron_dmc.ops.decode.layout import Layout


@dataclass
class Pages:
    """Pages as one step reads them, in any order. After the last one comes one that is nobody's: it stands for what is missing
    at the end of short rows.

    Attributes:
        content: [pages + 1, page_size, 2 * head_dim], keys and values side by side.
        bias: [pages + 1, page_size], added to the slots' scores: 0; -inf for what attention does not see; the log of its mass
            for a residual slot.
        owner: int64 [pages + 1], each page's row; nobody's: one after the last.
        place: int64 [pages], where in its row each stands: row * width + number.
        page: int64 [rows * width], the other way round.
    """

    content: Tensor
    bias: Tensor
    owner: Tensor
    place: Tensor
    page: Tensor

    @classmethod
    def of(cls, content: Tensor, bias: Tensor, owner: Tensor, place: Tensor, table: Tensor) -> "Pages":
        """Of the rows of a table [rows, width]."""
        page = place.new_full((table.numel(),), len(place))
        page[place] = torch.arange(len(place), device=place.device)
        return cls(content, bias, owner, place, page)


class Ahead:
    """Where the next steps write.

    Attributes:
        slots: int64 [rows, n]: one that nobody reads; the last slot kept and those after it; then those that the next steps
            write to in the ring, and so the reserved ones.
        column: int64 [rows, slots that a step writes], which of ``slots`` was written last: the last one kept; in the ring; a
            reserved one.
        moves: bool, like column: which of them the step moves on to the next one.
        bias: like column, of what is written, see Pages.
        reserved: int64 [rows * window_size], all slots of the open slots' last tokens, with a ``window_size``.
        ones, least: [window_size] and [1], to sum these tokens' weights with; with a ``window_size``.
        content: [rows, slots that a step writes, 2 * head_dim], what is written.
        slot_bias: [slots], see Pages; of all slots of the pool.
        pages: as attention reads them; None, and no slot_bias, where a step finds its pages itself.
    """

    slot_bias: Tensor
    pages: Pages | None = None

    def __init__(self, layout: Layout, cells: Cells, kept: Tensor, seen: Tensor, steps: int):
        """
        Args:
            kept: int64 [rows], see Rows.
            seen: tokens, int64 [rows].
            steps: that can be taken.
        """
        window, device = layout.local_window, kept.device
        wide = torch.promote_types(cells.dtype, torch.float32)
        after = torch.arange(steps, device=device)
        kept = kept[:, None] + torch.arange(-1, steps, device=device)
        # Of a row that has kept nothing yet, there is no last one.
        index = [torch.full_like(kept[:, :1], -1), torch.where(kept >= 0, layout.base + kept, -1)]
        if window:
            index.append((seen[:, None] + after) % window)
        if layout.recent:
            index.append(window + (seen[:, None] - window + after) % layout.recent)
            every = torch.arange(window, layout.base, device=device).expand(len(kept), -1)
            self.reserved = cells.places(every).flatten()
            self.ones = torch.ones(layout.recent, dtype=wide, device=device)
            self.least = torch.full((1,), torch.finfo(wide).tiny, dtype=wide, device=device)
        elif layout.absorbs:
            index.append(torch.full_like(kept[:, 1:], window))
        self.slots = cells.places(torch.cat(index, dim=1))
        starts = [1, *(1 + number * steps for number in range(1, layout.written_at_once))]
        self.column = torch.tensor(starts, device=device).repeat(len(kept), 1)
        self.moves = torch.ones_like(self.column, dtype=torch.bool)
        self.bias = torch.zeros_like(self.column, dtype=wide)
        if layout.recent:
            self.bias[:, -1] = float("-inf")
        self.content = cells.slots.new_empty(*self.column.shape, 2 * cells.head_dim, dtype=cells.dtype)
