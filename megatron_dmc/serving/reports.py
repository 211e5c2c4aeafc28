"""What a worker says of its requests after a step: numbers that may still be on their way from the device."""

from collections.abc import Iterator, Mapping
from functools import cached_property
from typing import Any

from torch import Tensor
from vllm.utils.math_utils import cdiv

from megatron_dmc.serving.copies import to_host
from megatron_dmc.serving.spec import Report


class Reports(Mapping[int, Report]):
    """By the requests' first blocks. Whoever reads or pickles it waits for the step; whoever made it goes on."""

    def __init__(self, firsts: list[int], numbers: Tensor, cells_per_block: int):
        """numbers: [3, requests] on the device: cells taken, slots without the rings, whether cells were wanting."""
        self._firsts, self._cells_per_block = firsts, cells_per_block
        self._wait = to_host(numbers)

    @cached_property
    def _reports(self) -> dict[int, Report]:
        each = zip(self._firsts, *self._wait(), strict=True)
        return {
            first: Report(cdiv(cells, self._cells_per_block), slots, overflows > 0)
            for first, cells, slots, overflows in each
        }

    def __getitem__(self, first: int) -> Report:
        return self._reports[first]

    def __iter__(self) -> Iterator[int]:
        return iter(self._reports)

    def __len__(self) -> int:
        return len(self._reports)

    def __reduce__(self) -> tuple[Any, ...]:
        return dict, (self._reports,)
