"""The state of all rows of a layer."""

import torch
from torch import Tensor

from megatron_dmc.ops.decode.ahead import Ahead, Pages
from megatron_dmc.ops.decode.cells import Cells, CodedCells
from megatron_dmc.ops.decode.layout import Layout
from megatron_dmc.ops.pooling import PoolState
from megatron_dmc.ops.residual import ResidualState

# Steps for which every row is given cells at once, so that nothing is allocated or read back in between.
AHEAD = 8


class Rows:
    """Lists of slots in cells, and what they do not hold. A row is sequence * kv_heads + head.

    Attributes:
        kept: int64 [rows], slots of the list from the layout's base on: tokens that have left the ring made them. It is
            brought up to date by :meth:`settle`.
        sums: [rows, 2 * head_dim + 1], N_k, N_v and the weight, of the open slot (merge) or of the residual one (absorb);
            float32 or wider. Without a token N = 0, and the weight is 1 for merge, so that nothing divides by zero.
        decisions: [rows, local_window], of the ring's tokens: omega, and its sign is negative where alpha is 0. Zero where
            there is none: it merges with weight 0, which changes nothing.
        recent: [rows, window_size], omega of the open slot's last tokens, 0 of others.
        ahead: what steps by torch's operations need beside it; None where room must be made first, and in other forms.
        steps: tokens that every row can take in before more room must be made.
        form: what steps run on.
    """

    form = "torch"

    def __init__(self, layout: Layout, batch: int, kv_heads: int, head_dim: int, *, like: Tensor):
        self.layout, self.batch, self.kv_heads, self.head_dim = layout, batch, kv_heads, head_dim
        rows = batch * kv_heads
        wide = torch.promote_types(like.dtype, torch.float32)
        codes = layout.codes(head_dim)
        self.cells = (
            Cells(rows, head_dim, layout.page_size, like=like)
            if codes is None
            else CodedCells(rows, layout.base, codes, layout.page_size, like=like)
        )
        self.kept = torch.zeros(rows, dtype=torch.long, device=like.device)
        self.sums = self.decisions = self.recent = None
        if layout.has_sums:
            self.sums = like.new_zeros(rows, 2 * head_dim + 1, dtype=wide)
            self.sums[:, -1] = int(layout.merges)
        if layout.local_window:
            self.decisions = like.new_zeros(rows, layout.local_window, dtype=wide)
        if layout.recent:
            self.recent = like.new_zeros(rows, layout.recent, dtype=wide)
        self.ahead: Ahead | None = None
        self.steps = 0

    def settle(self) -> None:
        """Brings ``kept`` up to date. Room must be made before the next step."""
        self.kept = self.count.flatten()
        self.ahead = None
        self.steps = 0

    def make_room(self, tokens: Tensor, steps: int) -> None:
        """For that many more tokens of every row, of which ``tokens`` [batch] were seen. Waits for the device."""
        self.settle()
        window = self.layout.local_window
        kept = self.kept + (tokens + steps - window).clamp(0, steps).repeat_interleave(self.kv_heads)
        self.cells.make_room(self.lengths(kept, tokens + steps))
        if self.form == "torch":
            self.look_ahead(tokens, steps)
        self.steps = steps

    def look_ahead(self, tokens: Tensor, steps: int) -> None:
        """Finds what the next steps need, after ``tokens`` [batch]."""
        cells = self.cells
        if self.layout.cache_dtype is not None:
            self.ahead = Ahead(self.layout, cells, self.kept, tokens.repeat_interleave(self.kv_heads), steps)
            return
        content = cells.first(cells.used + 1)
        row, number, cell = cells.named()
        ahead = Ahead(self.layout, cells, self.kept, tokens.repeat_interleave(self.kv_heads), steps)
        ahead.slot_bias = content.new_full((len(cells.slots),), float("-inf"), dtype=ahead.bias.dtype)
        bias = ahead.slot_bias[: len(content) * cells.page_size].unflatten(0, (-1, cells.page_size))
        bias[cell] = self.bias_of(row, number, self.kept, tokens)
        owner = row.new_full((len(content),), len(self.kept))
        owner[cell] = row
        place = torch.empty_like(cell)
        place[cell] = row * cells.table.shape[1] + number
        ahead.pages = Pages.of(content, bias, owner, place, cells.table)
        self.ahead = ahead

    def bias_of(self, row: Tensor, number: Tensor, kept: Tensor, tokens: Tensor) -> Tensor:
        """What attention adds to the scores of pages' slots, see Pages: [pages, page_size].

        Args:
            row, number: int64 [pages].
            kept: of all rows, [rows]; tokens: that were seen, [batch].
        """
        index = number[:, None] * self.layout.page_size + torch.arange(self.layout.page_size, device=row.device)
        return self.bias_at(row, index, kept, tokens)

    def bias_at(self, row: Tensor, index: Tensor, kept: Tensor, tokens: Tensor) -> Tensor:
        """The same of places ``index``, int64 [n, m], of the lists of rows [n]."""
        layout = self.layout
        hidden = index >= self.lengths(kept, tokens)[row][:, None]
        if layout.recent:
            hidden |= (index >= layout.local_window) & (index < layout.base)
        wide = torch.promote_types(self.cells.dtype, torch.float32)
        bias = torch.zeros_like(index, dtype=wide).masked_fill_(hidden, float("-inf"))
        if layout.absorbs:
            log_mass = self.residual_state.mass.flatten().log()[row]
            bias += log_mass[:, None].where(index == layout.local_window, 0)
        return bias

    def held(self, key: Tensor, value: Tensor) -> tuple[Tensor, Tensor]:
        """Keys and values [..., head_dim] as queries see them once they are kept."""
        codes = self.layout.codes(self.head_dim)
        return (key, value) if codes is None else codes.held(key, value)

    @property
    def count(self) -> Tensor:
        """``kept`` of this moment, int64 [batch, kv_heads]."""
        kept = self.kept
        if self.ahead is not None:
            kept = kept + self.ahead.column[:, 0] - 1
        return kept.unflatten(0, (self.batch, self.kv_heads))

    @property
    def appends(self) -> Tensor:
        """Where a step writes which rows its token opens a slot of: bool [batch, kv_heads]."""
        assert self.ahead is not None
        return self.ahead.moves.unflatten(0, (self.batch, self.kv_heads))[..., 0]

    def open_pages(self) -> Ahead:
        """Once ``appends`` is known, where the step's token goes. Every row has its cells already."""
        assert self.ahead is not None
        return self.ahead

    def pages(self, target: Tensor) -> Pages:
        """What a step's queries see after it has written to the slots ``target``, int64 [n]."""
        assert self.ahead is not None and self.ahead.pages is not None
        self.ahead.slot_bias.index_copy_(0, target, self.ahead.bias.flatten())
        return self.ahead.pages

    def lengths(self, kept: Tensor, seen: Tensor) -> Tensor:
        """Of the rows' lists, if ``seen`` tokens were and ``kept`` [rows] slots are, int64 [rows]; seen: [batch]."""
        ring = seen.clamp(max=self.layout.local_window).repeat_interleave(self.kv_heads)
        return torch.where(kept > 0, self.layout.base + kept, ring)

    @property
    def pool_state(self) -> PoolState:
        """The open slot's sums, as views [batch, kv_heads, ...]."""
        return PoolState(*self._sums())

    @property
    def residual_state(self) -> ResidualState:
        """The residual slot's sums, as views [batch, kv_heads, ...]."""
        return ResidualState(*self._sums())

    def _sums(self) -> tuple[Tensor, Tensor, Tensor]:
        assert self.sums is not None
        d = self.head_dim
        sums = self.sums.unflatten(0, (self.batch, self.kv_heads))
        return sums[..., :d], sums[..., d : 2 * d], sums[..., -1]

    def select(self, sequences: Tensor) -> None:
        """Sequence i becomes what sequences[i] was."""
        self.settle()
        heads = torch.arange(self.kv_heads, device=sequences.device)
        row = (sequences[:, None] * self.kv_heads + heads).flatten()
        self.cells.select(row)
        for name in ("kept", "sums", "decisions", "recent"):
            if (held := getattr(self, name)) is not None:
                setattr(self, name, held[row])
        self.batch = len(sequences)
