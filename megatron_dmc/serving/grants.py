"""Blocks that requests may take cells of: lists on the device, used by the kernels and by the form for any device alike."""

from collections.abc import Iterable, Mapping

import torch

from megatron_dmc.ops.decode.memory import Grants

# Of a place: blocks that may be used, cells that are taken, whether a cell was wanted and none was left; then its list.
GRANTED, CURSOR, OVERFLOW, LIST = range(4)


class GrantedBlocks:
    """A list for each running request, in a fixed number of places, at addresses that a captured graph may keep.

    Place 0 is nobody's and is granted nothing. Blocks that are no running request's first one lead there, so that what vLLM
    runs to warm up or to fill a batch takes no cell.

    Attributes:
        numbers: int32, one after another: each block's place, if it is a request's first one, and all places.
        lists: what kernels see of them.
        places: by the requests' first blocks.
    """

    def __init__(self, requests: int, most: int, blocks: int, cells_per_block: int, device: torch.device):
        """
        Args:
            requests: at once.
            most: blocks that one of them holds.
            blocks: of the pool.
        """
        self.width, self.start, self.most = LIST + most, blocks, most
        self.numbers = torch.zeros(blocks + (requests + 1) * self.width, dtype=torch.int32, device=device)
        places = self.numbers[blocks:].view(requests + 1, self.width)
        self.lists = Grants(
            blocks=places[:, LIST:],
            granted=places[:, GRANTED],
            cursor=places[:, CURSOR],
            overflow=places[:, OVERFLOW],
            cells_per_block=cells_per_block,
            place=self.numbers[:blocks],
        )
        self.places: dict[int, int] = {}
        self._granted = [0] * (requests + 1)
        self._free = list(range(requests, 0, -1))

    def plan(self, changes: Mapping[int, tuple[int, list[int]]], ended: Iterable[int]) -> dict[int, int]:
        """What is to be written to ``numbers`` before a step, value by index.

        Args:
            changes: by a request's first block, how many of its blocks it keeps and which it gets; none kept: it is new. A
                request fills them in the order of the list, so those that are taken away were never written to.
            ended: first blocks of requests that have ended since the step before.

        Raises:
            RuntimeError: the scheduler has more requests or grants more blocks than it said it would.
        """
        writes: dict[int, int] = {}
        for first in ended:
            if (place := self.places.pop(first, 0)) > 0:
                self._free.append(place)
                writes[first] = 0
        for first, (kept, new) in changes.items():
            if kept == 0 or first not in self.places:
                writes |= self._begin(first)
            writes |= self._grant(self.places[first], kept, new)
        return writes

    def _begin(self, first: int) -> dict[int, int]:
        if first not in self.places:
            if not self._free:
                raise RuntimeError(
                    f"megatron-dmc: more than {len(self.places)} requests hold blocks; this is an error of the plugin, "
                    "please report it"
                )
            self.places[first] = self._free.pop()
        place = self.places[first]
        self._granted[place] = 0
        start = self.start + place * self.width
        return {first: place, start + GRANTED: 0, start + CURSOR: 0, start + OVERFLOW: 0}

    def _grant(self, place: int, kept: int, new: list[int]) -> dict[int, int]:
        granted, start = kept + len(new), self.start + place * self.width
        if granted > self.most:
            raise RuntimeError(
                f"megatron-dmc: a request is granted {granted} blocks, there is room for {self.most}; this is an error of the "
                "plugin, please report it"
            )
        if granted == self._granted[place] and not new:
            return {}
        self._granted[place] = granted
        return {start + GRANTED: granted} | {start + LIST + kept + i: block for i, block in enumerate(new)}
