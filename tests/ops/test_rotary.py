"""Rotary embedding against complex multiplication, and the two properties that slots rely on."""

import pytest
import torch
from torch import Tensor

from megatron_dmc.ops.rotary import rotate, unrotate
from tests.support.oracle import Shape, draw_attention


def angles(positions: Tensor, head_dim: int) -> Tensor:
    """[1, seq, 1, head_dim], both halves alike."""
    frequency = 10000.0 ** -(torch.arange(head_dim // 2, dtype=torch.float64) * 2 / head_dim)
    half = positions.double()[:, None] * frequency
    return torch.cat([half, half], dim=-1)[None, :, None]


@pytest.mark.parametrize("shape", [Shape(2, 11, 3, 3, 8), Shape(1, 63, 2, 2, 6)], ids=str)
def test_is_a_complex_rotation_of_channel_pairs(shape: Shape) -> None:
    x = draw_attention(shape)["query"]
    theta, half = angles(torch.arange(shape.seq), shape.head_dim), shape.head_dim // 2
    turn = torch.polar(torch.ones_like(theta[..., :half]), theta[..., :half])
    pairs = torch.complex(x[..., :half], x[..., half:]) * turn
    expected = torch.cat([pairs.real, pairs.imag], dim=-1)
    torch.testing.assert_close(rotate(x, theta.cos(), theta.sin()), expected, rtol=1e-13, atol=1e-13)


def test_position_zero_changes_nothing() -> None:
    x = torch.randn(1, 1, 2, 6)
    theta = angles(torch.zeros(1), 6).float()
    assert torch.equal(rotate(x, theta.cos(), theta.sin()), x)


def test_scores_depend_on_the_distance_only() -> None:
    query, key = torch.randn(2, 1, 1, 1, 16, dtype=torch.float64).expand(2, 1, 5, 1, 16)

    def scores(offset: int) -> Tensor:
        theta = angles(offset + torch.arange(5), 16)
        q, k = (rotate(x, theta.cos(), theta.sin()) for x in (query, key))
        return torch.einsum("bihd,bjhd->bij", q, k)

    torch.testing.assert_close(scores(0), scores(12345), rtol=1e-9, atol=1e-9)
    torch.testing.assert_close(scores(0).diagonal(1, 1, 2), scores(0)[:, :1, 1].expand(1, 4), rtol=1e-12, atol=1e-12)


@pytest.mark.parametrize(
    ("dtype", "tolerance"), [(torch.float64, 1e-13), (torch.bfloat16, 1e-2)], ids=["float64", "bfloat16"]
)
def test_unrotate_is_the_inverse_for_rounded_angles_too(dtype: torch.dtype, tolerance: float) -> None:
    """A key that leaves a ring of rotated entries is rotated back before it is merged."""
    x = draw_attention(Shape(2, 7, 2, 2, 8), dtype=dtype)["key"]
    theta = angles(torch.arange(100, 107), 8)
    cos, sin = theta.cos().to(dtype), theta.sin().to(dtype)
    back = unrotate(rotate(x, cos, sin), cos, sin)
    assert back.dtype == dtype
    torch.testing.assert_close(back, x, rtol=tolerance, atol=tolerance)


def test_keeps_dtype_and_computes_in_the_wider_one() -> None:
    x = torch.randn(1, 9, 2, 8).bfloat16()
    theta = angles(torch.arange(9), 8).float()
    rotated = rotate(x, theta.cos(), theta.sin())
    assert rotated.dtype == torch.bfloat16
    assert torch.equal(rotated, rotate(x.float(), theta.cos(), theta.sin()).bfloat16())


def test_gradient() -> None:
    x = torch.randn(1, 3, 2, 4, dtype=torch.float64, requires_grad=True)
    theta = angles(torch.arange(3), 4)
    assert torch.autograd.gradcheck(lambda y: rotate(y, theta.cos(), theta.sin()), x)
