"""A request's first blocks: where in them the state of each of its rows lies."""

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

from vllm.utils.math_utils import cdiv

from megatron_dmc.ops.decode.layout import Layout

# Words of 4 bytes: slots kept.
KEPT, FIRST_FREE = range(2)


@dataclass(frozen=True)
class Header:
    """The state of one (request, layer, KV head) in words of 4 bytes: a count, sums, decisions of the ring, page table.

    Attributes:
        layout: of a row's list of slots.
        head_dim: d.
        longest: tokens that a request may have.
    """

    layout: Layout
    head_dim: int
    longest: int

    @classmethod
    def of(cls, dmc: Mapping[str, Any], head_dim: int, longest: int, page_size: int) -> "Header":
        """dmc: an export's settings."""
        # What would hold more tokens than a request has.
        layout = Layout(
            min(dmc["local_window"], longest),
            dmc["operation"],
            dmc["window_size"] and min(dmc["window_size"], longest),
            clears_last_channel=dmc["decision_source"] == "neuron",
            page_size=page_size,
        )
        return cls(layout, head_dim, longest)

    @property
    def sums(self) -> slice:
        """float32: N_k, N_v and the weight, of the open or of the residual slot."""
        return slice(FIRST_FREE, FIRST_FREE + (2 * self.head_dim + 1 if self.layout.has_sums else 0))

    @property
    def decisions(self) -> slice:
        """float32: omega of each token in the ring, negative where alpha is 0."""
        return slice(self.sums.stop, self.sums.stop + self.layout.local_window)

    @property
    def recent(self) -> slice:
        """float32: with a window_size, omega of the open slot's last tokens."""
        return slice(self.decisions.stop, self.decisions.stop + self.layout.recent)

    @property
    def table(self) -> slice:
        """int32: the page table, of a row that merges nothing."""
        return slice(self.recent.stop, self.words(self.longest))

    @property
    def reserved_slots(self) -> int:
        """Of every row's list, beside those of its tokens."""
        return self.layout.reserved

    def blocks(self, itemsize: int) -> int:
        """A request's first blocks, which hold its state; itemsize: bytes of a number in the cache."""
        return int(cdiv(self.table.stop, self.layout.page_size * 2 * self.head_dim * itemsize // 4))

    def words(self, longest: int) -> int:
        """Of one row's state, if its request has ``longest`` tokens at most."""
        return self.recent.stop + int(cdiv(longest + self.reserved_slots, self.layout.page_size))
