"""A request's first blocks: where in them the state of each of its rows lies."""

from dataclasses import dataclass

from vllm.utils.math_utils import cdiv

from megatron_dmc.ops.decode.layout import Layout

# Words of 4 bytes: slots kept, tokens seen.
KEPT, SEEN, FIRST_FREE = range(3)


@dataclass(frozen=True)
class Header:
    """The state of one (request, layer, KV head) in words of 4 bytes: numbers, sums, decisions of the ring, page table.

    Attributes:
        layout: of a row's list of slots.
        head_dim: d.
    """

    layout: Layout
    head_dim: int

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
        recent = self.layout.window_size or 0 if self.layout.merges else 0
        return slice(self.decisions.stop, self.decisions.stop + recent)

    @property
    def table(self) -> int:
        """Where the page table begins, an int32 for each page."""
        return self.recent.stop

    @property
    def reserved_slots(self) -> int:
        """Of every row's list, beside those of its tokens."""
        return self.layout.base - self.layout.local_window

    def blocks(self, longest: int, cell_words: int) -> int:
        """A request's first blocks that hold its state, if it has ``longest`` tokens at most and a cell so many words."""
        return cdiv(self.words(longest), cell_words)

    def words(self, longest: int) -> int:
        """Of one row's state, if its request has ``longest`` tokens at most."""
        return self.table + cdiv(longest + self.reserved_slots, self.layout.page_size)
