"""Padding is taken out once, before the layers, and put back once, after them."""

import torch
from torch import Tensor


class Packing:
    """Moves every row's real tokens to its front, in order.

    Attributes:
        real: bool [batch, seq].
        lengths: int64 [batch], real tokens of each row.
        place: int64 [batch, seq], a real token's place among its row's real tokens; at padding that of some real token.
    """

    def __init__(self, mask: Tensor):
        """mask: [batch, seq], nonzero at real tokens."""
        self.real = mask != 0
        self.lengths = self.real.sum(1)
        longest = max(int(self.lengths.max()), 1)
        self._source = self.real.logical_not().to(torch.uint8).argsort(dim=1, stable=True)[:, :longest]
        self.place = (self.real.cumsum(1) - 1).clamp(min=0)

    def pack(self, hidden: Tensor) -> Tensor:
        """[batch, seq, hidden] -> [batch, longest, hidden]; positions past a row's length are padding."""
        return _take(hidden, self._source)

    def unpack(self, hidden: Tensor) -> Tensor:
        """The inverse for real tokens. Values at padding are finite but undefined."""
        return _take(hidden, self.place)


def _take(hidden: Tensor, index: Tensor) -> Tensor:
    # The layers may be on several devices, and the last layer's states on another device than the mask.
    return hidden.gather(1, index.to(hidden.device).unsqueeze(-1).expand(-1, -1, hidden.shape[-1]))
