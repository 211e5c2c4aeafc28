"""Slots as codes of few bits, each slot by itself, so that it can be written when it is made and again when it changes."""

import functools
from dataclasses import dataclass
from typing import Literal, get_args

import torch
from torch import Tensor

CacheDtype = Literal["int8", "fp8", "int4"]
CACHE_DTYPES = get_args(CacheDtype)
# Channels that share an offset and a step, at most.
LARGEST_GROUP = 64
# Larger numbers count as this one: the difference of two must be finite in float32.
LARGEST = 2.0**126
# The least step: of a group whose channels are equal. Its inverse must be finite.
LEAST_STEP = 2.0**-126
LARGEST_FP8 = 448.0


def check_cache_dtype(name: str, value: object) -> CacheDtype | None:
    """value, if it is None or says how kept slots are stored; raises ValueError, which calls it ``name``, if not."""
    if value is not None and value not in CACHE_DTYPES:
        raise ValueError(f"{name} must be {', '.join(CACHE_DTYPES)}, or none for the model's own dtype, got {value!r}")
    return value  # type: ignore[return-value]


@dataclass(frozen=True)
class Codes:
    """What the key and the value of a slot are in bytes.

    ``int8`` and ``int4``: a key is turned by a Hadamard matrix (as large as the largest power of two that divides head_dim),
    which spreads its large channels over the others (QuaRot, arXiv 2404.00456). Then each group of channels x, of key and
    value, is offset + step * code with code = round((x - offset) / step). Offset and step are bf16, the offset rounded down
    from the least channel and the step rounded up, so that no channel is cut off: |error| <= step / 2. Bytes: the key's codes,
    the value's; offsets of the key's groups and of the value's, then steps. With ``int4`` a byte holds channel i in its low
    half and channel i + head_dim / 2 in the high one.

    ``fp8``: bytes are float8_e4m3fn, nothing else; numbers beyond +-448 are 448.

    Attributes:
        head_dim: even.
        clears_last_channel: a key's last channel is taken for zero and given back as zero, see Layout.
    """

    cache_dtype: CacheDtype
    head_dim: int
    clears_last_channel: bool = False

    @property
    def most(self) -> int:
        """The largest code."""
        return 15 if self.cache_dtype == "int4" else 255

    @property
    def group(self) -> int:
        """Channels of a group."""
        return max(n for n in range(1, min(LARGEST_GROUP, self.head_dim) + 1) if self.head_dim % n == 0)

    @property
    def code_bytes(self) -> int:
        """Of a slot, without offsets and steps."""
        return self.head_dim if self.cache_dtype == "int4" else 2 * self.head_dim

    @property
    def slot_bytes(self) -> int:
        groups = 0 if self.cache_dtype == "fp8" else 2 * self.head_dim // self.group
        return self.code_bytes + 2 * 2 * groups

    def encode(self, content: Tensor) -> Tensor:
        """[..., 2 * head_dim], key and value side by side -> uint8 [..., slot_bytes]. NaN stays NaN, in all of its group."""
        if self.clears_last_channel:
            content = content.index_fill(-1, torch.tensor(self.head_dim - 1, device=content.device), 0)
        if self.cache_dtype == "fp8":
            return content.clamp(-LARGEST_FP8, LARGEST_FP8).to(torch.float8_e4m3fn).view(torch.uint8)
        x = content.to(torch.promote_types(content.dtype, torch.float32)).clamp(-LARGEST, LARGEST)
        x = torch.cat([self._turned(x[..., : self.head_dim]), x[..., self.head_dim :]], dim=-1)
        groups = x.unflatten(-1, (-1, self.group))
        offset = _rounded(groups.amin(-1), float("-inf"))
        step = _rounded((groups.amax(-1) - offset.to(x.dtype)) / self.most, float("inf")).clamp(min=LEAST_STEP)
        code = ((groups - offset.to(x.dtype)[..., None]) / step.to(x.dtype)[..., None]).round().clamp(0, self.most)
        code = code.nan_to_num().to(torch.uint8).flatten(-2)
        if self.cache_dtype == "int4":
            low, high = code.unflatten(-1, (2, 2, -1)).unbind(-2)
            code = (low | high << 4).flatten(-2)
        return torch.cat([code, torch.cat([offset, step], dim=-1).view(torch.uint8)], dim=-1)

    def decode(self, codes: Tensor, dtype: torch.dtype = torch.float32) -> Tensor:
        """The inverse, as near as it comes: uint8 [..., slot_bytes] -> [..., 2 * head_dim] in dtype, float32 or wider."""
        d = self.head_dim
        if self.cache_dtype == "fp8":
            x = codes.view(torch.float8_e4m3fn).to(dtype)
        else:
            code, parts = codes[..., : self.code_bytes], codes[..., self.code_bytes :]
            if self.cache_dtype == "int4":
                code = code.unflatten(-1, (2, -1))
                code = torch.stack([code & 15, code >> 4], dim=-2).flatten(-3)
            offset, step = parts.contiguous().view(torch.bfloat16).to(dtype).chunk(2, dim=-1)
            x = (offset[..., None] + step[..., None] * code.unflatten(-1, (-1, self.group))).flatten(-2)
            x = torch.cat([self._turned(x[..., :d]), x[..., d:]], dim=-1)
        if self.clears_last_channel:
            x[..., d - 1] = 0
        return x

    def held(self, key: Tensor, value: Tensor) -> tuple[Tensor, Tensor]:
        """What a query sees of them once they are kept: [..., head_dim] each, in key's dtype."""
        wide = torch.promote_types(key.dtype, torch.float32)
        both = self.decode(self.encode(torch.cat([key, value], dim=-1)), wide).to(key.dtype)
        return both[..., : self.head_dim], both[..., self.head_dim :]

    def _turned(self, key: Tensor) -> Tensor:
        matrix = _hadamard(self.head_dim & -self.head_dim, key.dtype, key.device)
        return key.unflatten(-1, (-1, len(matrix))).matmul(matrix).flatten(-2)


@functools.cache
def _hadamard(size: int, dtype: torch.dtype, device: torch.device) -> Tensor:
    """Sylvester's, [size, size]: orthogonal, symmetric, and so its own inverse. size: a power of two."""
    matrix = torch.ones(1, 1, dtype=dtype, device=device)
    while len(matrix) < size:
        matrix = torch.cat([torch.cat([matrix, matrix], 1), torch.cat([matrix, -matrix], 1)])
    return matrix / size**0.5


def _rounded(x: Tensor, towards: float) -> Tensor:
    """In bf16, on that side of x."""
    near = x.bfloat16()
    beyond = near.to(x.dtype) > x if towards < 0 else near.to(x.dtype) < x
    return torch.where(beyond, near.nextafter(torch.full_like(near, towards)), near)
