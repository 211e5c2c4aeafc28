"""Numbers in few bits each, and two numbers more for every group of them."""

from typing import NamedTuple

import torch
from torch import Tensor


class Packed(NamedTuple):
    """Numbers [..., n] in groups along the last dimension: low + step * code.

    Attributes:
        codes: uint8 [..., groups, group * bits / 8].
        low, step: [..., groups, 1], in the numbers' own dtype.
        bits: of a code.
    """

    codes: Tensor
    low: Tensor
    step: Tensor
    bits: int

    @classmethod
    def of(cls, numbers: Tensor, bits: int, group: int) -> "Packed":
        """The least and the largest number of a group are codes 0 and 2^bits - 1 (KIVI's equation 1).

        Args:
            bits: a divisor of 8.
            group: numbers in a group, a divisor of n; fills bytes.
        """
        groups = numbers.unflatten(-1, (-1, group))
        low, high = groups.aminmax(dim=-1, keepdim=True)
        most = 2**bits - 1
        step = ((high.float() - low.float()) / most).to(numbers.dtype)
        # Where all are equal any step will do.
        codes = (groups.float() - low.float()) / step.float().where(step != 0, 1.0)
        bytes_ = codes.round().clamp(0, most).to(torch.uint8).unflatten(-1, (-1, 8 // bits))
        return cls((bytes_ << _shifts(bits, bytes_)).sum(-1, dtype=torch.uint8), low, step, bits)

    def numbers(self) -> Tensor:
        """[..., n], in their own dtype."""
        codes = (self.codes[..., None] >> _shifts(self.bits, self.codes)) & (2**self.bits - 1)
        return (self.low.float() + self.step.float() * codes.flatten(-2)).to(self.low.dtype).flatten(-2)

    @property
    def nbytes(self) -> int:
        return self.codes.nbytes + self.low.nbytes + self.step.nbytes


def _shifts(bits: int, like: Tensor) -> Tensor:
    return torch.arange(0, 8, bits, dtype=torch.uint8, device=like.device)
