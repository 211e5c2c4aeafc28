"""A request's first blocks: where in them the state of each of its rows lies."""

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import torch
from vllm.utils.math_utils import cdiv

from megatron_dmc.ops.decode.cells import NearCells
from megatron_dmc.ops.decode.codes import CacheDtype
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
        dtype: of keys and values, where they are no codes.
    """

    layout: Layout
    head_dim: int
    longest: int
    dtype: torch.dtype

    @classmethod
    def of(
        cls,
        dmc: Mapping[str, Any],
        head_dim: int,
        longest: int,
        page_size: int,
        *,
        dtype: torch.dtype,
        cache_dtype: CacheDtype | None = None,
    ) -> "Header":
        """
        Args:
            dmc: an export's settings.
            cache_dtype: in which kept slots are stored; None: in dtype.
        """
        # What would hold more tokens than a request has.
        layout = Layout(
            min(dmc["local_window"], longest),
            dmc["operation"],
            dmc["window_size"] and min(dmc["window_size"], longest),
            clears_last_channel=dmc["decision_source"] == "neuron",
            page_size=page_size,
            cache_dtype=cache_dtype,
        )
        return cls(layout, head_dim, longest, dtype)

    @classmethod
    def of_model(cls, model: Any, page_size: int) -> "Header":
        """model: vLLM's ModelConfig."""
        config = model.hf_config
        return cls.of(
            config.dmc,
            model.get_head_size(),
            model.max_model_len,
            page_size,
            dtype=model.dtype,
            cache_dtype=config.cache_dtype,
        )

    @property
    def near(self) -> NearCells | None:
        """How the ring lies in cells of codes; None: there are none."""
        return NearCells.of(self.layout, self.head_dim, self.dtype)

    @property
    def stored_as(self) -> torch.dtype:
        """What a kept slot is a row of."""
        return self.dtype if self.near is None else torch.uint8

    @property
    def slot_bytes(self) -> int:
        """Of a kept slot."""
        codes = self.layout.codes(self.head_dim)
        return 2 * self.head_dim * self.dtype.itemsize if codes is None else codes.slot_bytes

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
        """Of every row's list, beside those of its tokens; 0 where they and the ring have cells of their own."""
        return self.layout.reserved if self.near is None else 0

    @property
    def near_cells(self) -> int:
        """Cells of a row that hold no codes and come with its first token."""
        return 0 if self.near is None else self.near.cells

    @property
    def blocks(self) -> int:
        """A request's first blocks, which hold its state."""
        return int(cdiv(self.table.stop, self.layout.page_size * self.slot_bytes // 4))

    def words(self, longest: int) -> int:
        """Of one row's state, if its request has ``longest`` tokens at most."""
        return self.recent.stop + self.near_cells + int(cdiv(longest + self.reserved_slots, self.layout.page_size))
