"""What kernels must know of a step in which requests have one token each: made on the device, at addresses that stay."""

from dataclasses import dataclass, fields

import torch
from torch import Tensor


def rotation_at(positions: Tensor, angles: Tensor, dtype: torch.dtype) -> tuple[Tensor, Tensor]:
    """cos and sin of positions [...], each [..., head_dim] in dtype; before the first one, where nobody reads them, any.

    Args:
        angles: [positions, cos | sin], each head_dim / 2 wide: both halves of a rotation are alike.
    """
    halves = angles[positions.clamp(min=0)].to(dtype).chunk(2, dim=-1)
    cos, sin = (torch.cat([half, half], dim=-1) for half in halves)
    return cos, sin


@dataclass
class Decoding:
    """The first requests of a batch, one token each; also what ``ops/decode/triton.py`` calls OneToken.

    Attributes:
        tokens: int32 [requests], seen, with the new one; 0: there is no such request, a graph is captured or filled up.
        place: int32 [requests], the block that holds a request's state; 0 where there is none.
        cos, sin: [requests, head_dim] of the new token's position.
        leaving_cos, leaving_sin: of the position of the token that leaves the ring; without a ring, of the new token's.
    """

    tokens: Tensor
    place: Tensor
    cos: Tensor
    sin: Tensor
    leaving_cos: Tensor
    leaving_sin: Tensor

    def first(self, requests: int) -> "Decoding":
        return Decoding(*(getattr(self, field.name)[:requests] for field in fields(self)))


class DecodingBuffers:
    """Memory of every step's Decoding, so that a captured graph finds the next step's numbers.

    They are written on the stream of the step before, after it.

    Attributes:
        all: as if the batch were as large as it may be.
    """

    def __init__(self, requests: int, window: int, angles: Tensor, dtype: torch.dtype):
        """
        Args:
            requests: at once.
            window: local_window.
            angles: [positions, cos | sin], each head_dim / 2 wide.
            dtype: of the queries.
        """
        self.window, self.angles = window, angles
        tokens, place = torch.zeros(2, requests, dtype=torch.int32, device=angles.device)
        rotations = torch.zeros(4, requests, angles.shape[1], dtype=dtype, device=angles.device)
        self.all = Decoding(tokens, place, *rotations)

    def filled(self, first_blocks: Tensor, lengths: Tensor) -> Decoding:
        """Of requests with these first blocks and so many tokens, with the new ones; both [requests], on the device."""
        now = self.all.first(len(lengths))
        now.place.copy_(first_blocks)
        # What vLLM's null block belongs to is no request.
        torch.mul(lengths, first_blocks != 0, out=now.tokens)
        position = now.tokens - 1
        new, leaving = (rotation_at(each, self.angles, now.cos.dtype) for each in (position, position - self.window))
        for to, found in zip((now.cos, now.sin, now.leaving_cos, now.leaving_sin), (*new, *leaving), strict=True):
            to.copy_(found)
        return now
