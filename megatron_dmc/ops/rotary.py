"""Rotary position embedding (Su et al., arXiv 2104.09864) in Llama's half-split form."""

import torch
from torch import Tensor


def rotation(angles: Tensor, dtype: torch.dtype) -> tuple[Tensor, Tensor]:
    """cos and sin of the angles, computed in the angles' dtype and rounded once."""
    return angles.cos().to(dtype), angles.sin().to(dtype)


def rotate(x: Tensor, cos: Tensor, sin: Tensor) -> Tensor:
    """Rotates channel pairs (i, i + head_dim / 2).

    Args:
        x: [batch, seq, heads, head_dim].
        cos, sin: the angles' cosine and sine, both halves alike, broadcastable to [batch, seq, 1, head_dim].

    Returns:
        x's shape and dtype; computed in the wider of x's and cos's dtypes.
    """
    half = x.shape[-1] // 2
    swapped = torch.cat([-x[..., half:], x[..., :half]], dim=-1)
    return (x * cos + swapped * sin).to(x.dtype)


def unrotate(x: Tensor, cos: Tensor, sin: Tensor) -> Tensor:
    """The inverse of :func:`rotate`, also where cos and sin are rounded; shapes as there. Computed in float32 or wider."""
    wide = torch.promote_types(x.dtype, torch.float32)
    cos, sin = cos.to(wide), sin.to(wide)
    return (rotate(x.to(wide), cos, -sin) / (cos * cos + sin * sin)).to(x.dtype)


def rotation_matrix(cos: Tensor, sin: Tensor) -> Tensor:
    """The matrix M with x @ M = rotate(x): one operation where a few vectors share a position.

    Args:
        cos, sin: [batch, head_dim].

    Returns:
        [batch, head_dim, head_dim]
    """
    unit = torch.eye(cos.shape[-1], dtype=cos.dtype, device=cos.device)
    half = cos.shape[-1] // 2
    swap = unit.roll(half, 1)
    swap[half:].neg_()
    return unit * cos[:, None] + swap * sin[:, None]
