"""The state of all rows of a layer."""

import torch
from torch import Tensor

from megatron_dmc.ops.decode.cells import Cells, Pages
from megatron_dmc.ops.decode.layout import Layout
from megatron_dmc.ops.decode.sequences import Step
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
        ahead: int64 [rows, base + 1 + n], slots of the ring, the reserved ones, the last one kept and the n after it; n is how
            many steps room was made for, AHEAD or what was reserved. [rows, 0] where room must be made first.
        column: int64 [rows, slots that a step writes], which of ``ahead``: the last one kept; in the ring; a reserved one.
        steps: tokens that every row can take in before more room must be made.
        form: what steps run on.
    """

    form = "torch"

    def __init__(self, layout: Layout, batch: int, kv_heads: int, head_dim: int, *, like: Tensor):
        self.layout, self.batch, self.kv_heads, self.head_dim = layout, batch, kv_heads, head_dim
        rows = batch * kv_heads
        wide = torch.promote_types(like.dtype, torch.float32)
        self.cells = Cells(rows, head_dim, layout.page_size, like=like)
        self.kept = torch.zeros(rows, dtype=torch.long, device=like.device)
        self.sums = self.decisions = self.recent = None
        if layout.has_sums:
            self.sums = like.new_zeros(rows, 2 * head_dim + 1, dtype=wide)
            self.sums[:, -1] = int(layout.merges)
        if layout.local_window:
            self.decisions = like.new_zeros(rows, layout.local_window, dtype=wide)
        if layout.recent:
            self.recent = like.new_zeros(rows, layout.recent, dtype=wide)
        self.column = torch.zeros(rows, layout.written_at_once, dtype=torch.long, device=like.device)
        self.ahead = torch.zeros(rows, 0, dtype=torch.long, device=like.device)
        self.steps = 0

    def settle(self) -> None:
        """Brings ``kept`` up to date. Room must be made before the next step."""
        self.kept = self.count.flatten()
        self.ahead = self.ahead[:, :0].clone()
        self.steps = 0

    def make_room(self, tokens: Tensor, steps: int) -> None:
        """For that many more tokens of every row, of which ``tokens`` [batch] were seen. Waits for the device."""
        self.settle()
        window = self.layout.local_window
        kept = self.kept + (tokens + steps - window).clamp(0, steps).repeat_interleave(self.kv_heads)
        self.cells.make_room(self.lengths(kept, tokens + steps))
        self.look_ahead(steps)
        self.steps = steps

    def look_ahead(self, steps: int) -> None:
        """Finds the slots that the next steps may write to."""
        base = self.layout.base
        ahead = torch.arange(base + 1 + steps, device=self.kept.device).expand(len(self.kept), -1)
        # Of a row that has kept nothing yet, there is no last one.
        kept = torch.where((ahead > base) | (self.kept > 0)[:, None], self.kept[:, None] + ahead - 1, -1)
        self.ahead = self.cells.places(torch.where(ahead < base, ahead, kept))
        self.column[:, 0] = base
        if self.layout.absorbs:
            self.column[:, -1] = self.layout.local_window

    @property
    def count(self) -> Tensor:
        """``kept`` of this moment, int64 [batch, kv_heads]."""
        kept = self.kept
        if self.ahead.shape[1]:
            kept = kept + self.column[:, 0] - self.layout.base
        return kept.unflatten(0, (self.batch, self.kv_heads))

    def open_pages(self, appends: Tensor, call: Step) -> None:
        """Before a step's token takes its place: appends, bool [batch, kv_heads]. Every row has its cells already."""

    def pages(self, call: Step) -> Pages:
        """What a step's queries see."""
        return self.cells.pages()

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
        for name in ("kept", "sums", "decisions", "recent", "column", "ahead"):
            if (held := getattr(self, name)) is not None:
                setattr(self, name, held[row])
        self.batch = len(sequences)
