"""How a row of the cache is laid out. A row is one sequence and KV head."""

from dataclasses import dataclass

from megatron_dmc.ops.attention.types import Operation
from megatron_dmc.ops.decode.codes import CacheDtype, Codes


@dataclass(frozen=True)
class Layout:
    """A row is one list of slots, cut into pages; a slot holds a key and a value, side by side.

        [0, local_window)      the ring: the last tokens, rotated. Position p has place p mod local_window.
        [local_window, base)   reserved: with ``absorb`` the residual slot; with a ``window_size`` the last tokens of the
                               open slot, not rotated, which attention does not see.
        [base, base + kept)    what is kept of the tokens that left the ring, the open slot last: rotated.

    Attributes:
        local_window, operation, window_size: see DMCConfig.
        clears_last_channel: the last channel of queries and keys is zero after the rotation (the ``neuron`` source).
        page_size: slots of a page.
        cache_dtype: codes in which kept slots are stored, see codes.py. The ring and reserved places lie beside the pages
            then, as they are, and the list's places are what they were. None: all lie in pages, in the model's dtype.
    """

    local_window: int = 0
    operation: Operation = "merge"
    window_size: int | None = None
    clears_last_channel: bool = False
    page_size: int = 16
    cache_dtype: CacheDtype | None = None

    def codes(self, head_dim: int) -> Codes | None:
        """How kept slots are stored; None: as they are."""
        return None if self.cache_dtype is None else Codes(self.cache_dtype, head_dim, self.clears_last_channel)

    @property
    def base(self) -> int:
        """The first place in the list that is neither the ring's nor reserved."""
        return self.local_window + self.reserved

    @property
    def reserved(self) -> int:
        """Places of the list that are no token's."""
        return int(self.absorbs) or self.recent

    @property
    def recent(self) -> int:
        """Tokens of the open slot that are held one by one, in reserved places."""
        return self.window_size or 0 if self.merges else 0

    @property
    def written_at_once(self) -> int:
        """Slots of a row that a step writes."""
        return 1 + bool(self.local_window) + bool(self.reserved)

    @property
    def merges(self) -> bool:
        return self.operation == "merge"

    @property
    def absorbs(self) -> bool:
        return self.operation == "absorb"

    @property
    def has_sums(self) -> bool:
        """Whether a row has running sums: of its open slot, or of its residual slot."""
        return self.absorbs or (self.merges and not self.recent)
