"""Where a kernel finds the rows of a layer: in this package's own tensors, or in the memory of a serving engine."""

from typing import NamedTuple, Protocol

import torch
from torch import Tensor

from megatron_dmc.ops.decode.cells import CodedCells, NearCells
from megatron_dmc.ops.decode.codes import Codes
from megatron_dmc.ops.decode.rows import Rows


class Grants(NamedTuple):
    """Cells that a sequence may take by itself, by way of blocks of them; indexed by the sequence's place, or by way of it.

    Attributes:
        blocks: int32 [places, most], cell = block * cells_per_block + i; in the order in which they are used up.
        granted: int32 [places], how many of them may be used.
        cursor: int32 [places], cells that are taken. Every row of the sequence counts it up.
        overflow: int32 [places], becomes 1 when a cell was wanted and none was left: the write is dropped then.
        cells_per_block: cells of a block.
        place: int32 [places], by a sequence's place in Memory its place in these tensors; None: they are the same.
    """

    blocks: Tensor
    granted: Tensor
    cursor: Tensor
    overflow: Tensor
    cells_per_block: int
    place: Tensor | None = None

    @property
    def stride(self) -> int:
        """From one sequence's numbers to the next one's.

        Raises:
            ValueError: there is no such one.
        """
        strides = {x.stride(0) for x in (self.granted, self.cursor, self.overflow)}
        if len(strides) > 1:
            raise ValueError(f"granted, cursor and overflow must have one stride, got {sorted(strides)}")
        return strides.pop()


class OneToken(Protocol):
    """What a step must know of the sequences; Step in sequences.py is one once the new token has been counted.

    Attributes:
        tokens: int64 or int32 [batch], seen, with the new one. A sequence of 0 is none: nothing is read or written for it,
            and its output is zero.
        cos, sin: [batch, head_dim] of the new token's position.
        leaving_cos, leaving_sin: of the position of the token that leaves the ring; without a ring, of the new token's.
    """

    tokens: Tensor
    cos: Tensor
    sin: Tensor
    leaving_cos: Tensor
    leaving_sin: Tensor


class Memory(NamedTuple):
    """Slots and state of all rows. Any strides will do, if the last dimension is dense.

    The state of sequence i and KV head h lies at [place[i], h]. A serving engine's state, 32-bit words inside blocks of its
    pool, is such tensors too: views of the words as int32 and float32 with the strides of blocks and heads.

    Attributes:
        slots: [slots, 2 * head_dim], keys and values side by side; slot i of cell c is c * page_size + i.
        cells: how many; a kernel leaves alone what a table names beyond them.
        table: int32 [places, kv_heads, pages], cells; -1 is none.
        kept: int32 or int64 [places, kv_heads], see Rows; always up to date.
        sums: float32 [places, kv_heads, 2 * head_dim + 1], see Rows; None: the layout has none.
        decisions: float32 [places, kv_heads, local_window], see Rows; None: there is no ring.
        recent: float32 [places, kv_heads, window_size], see Rows; None: the layout has none.
        place: int32 or int64 [batch]; None: sequence i's is i.
        grants: None: every row has all cells that it will need.
        near: [places, kv_heads, base, 2 * head_dim], the ring and reserved places, see CodedCells; None: they lie in cells.
        codes: what slots are, uint8 [slots, bytes of a slot]; None: as they are.
        near_cells: how the ring and reserved places lie in cells of codes; None: they do not.
    """

    slots: Tensor
    cells: int
    table: Tensor
    kept: Tensor
    sums: Tensor | None = None
    decisions: Tensor | None = None
    recent: Tensor | None = None
    place: Tensor | None = None
    grants: Grants | None = None
    near: Tensor | None = None
    codes: Codes | None = None
    near_cells: NearCells | None = None

    @property
    def kv_heads(self) -> int:
        return self.table.shape[1]

    @property
    def head_dim(self) -> int:
        return self.slots.shape[1] // 2 if self.codes is None else self.codes.head_dim

    @property
    def dtype(self) -> torch.dtype:
        """Of keys and values that lie there as they are."""
        if self.near_cells is not None:
            return self.near_cells.dtype
        return self.slots.dtype if self.near is None else self.near.dtype

    @classmethod
    def of(cls, rows: Rows) -> "Memory":
        """This package's own."""
        heads = (rows.batch, rows.kv_heads)
        cells = rows.cells
        near = codes = None
        if isinstance(cells, CodedCells):
            codes = cells.codes
            near = cells.near[:-1].view(*heads, cells.base, 2 * rows.head_dim)
        return cls(
            slots=cells.slots,
            cells=cells.used,
            table=cells.table.unflatten(0, heads),
            kept=rows.kept.unflatten(0, heads),
            sums=None if rows.sums is None else rows.sums.unflatten(0, heads),
            decisions=None if rows.decisions is None else rows.decisions.unflatten(0, heads),
            recent=None if rows.recent is None else rows.recent.unflatten(0, heads),
            near=near,
            codes=codes,
        )


def fits(x: Tensor) -> Tensor:
    """x, copied if its last dimension is not dense."""
    return x if x.stride(-1) == 1 else x.contiguous()
