"""Slots as codes against their oracle, and what an error may be."""

import pytest
import torch
from torch import Tensor

from megatron_dmc.ops.decode import naive
from megatron_dmc.ops.decode.codes import CACHE_DTYPES, LARGEST, Codes, check_cache_dtype
from tests.support.oracle import Draw

by_cache_dtype = pytest.mark.parametrize("cache_dtype", CACHE_DTYPES)
AFFINE = [name for name in CACHE_DTYPES if name != "fp8"]


def draw(*shape: int) -> Tensor:
    """Slots of very different sizes, with channels that stand out."""
    slots = Draw(sum(shape)).normal(*shape)
    slots[..., 3] *= 30
    return slots * torch.tensor([1e-3, 1.0, 40.0])[:, None]


def by_oracle(slots: Tensor, head_dim: int, cache_dtype: str) -> Tensor:
    rows = [
        torch.cat([naive.key_as_codes(x[:head_dim], cache_dtype), naive.as_codes(x[head_dim:], cache_dtype)])
        for x in slots.flatten(0, -2)
    ]
    return torch.stack(rows).view(slots.shape)


@by_cache_dtype
@pytest.mark.parametrize("head_dim", [2, 8, 62, 64, 80, 100, 128])
def test_equals_oracle(head_dim, cache_dtype):
    slots, codes = draw(5, 3, 2 * head_dim), Codes(cache_dtype, head_dim)
    encoded = codes.encode(slots)
    assert encoded.dtype == torch.uint8 and encoded.shape == (5, 3, codes.slot_bytes)
    found = codes.decode(encoded, torch.float64)
    torch.testing.assert_close(found, by_oracle(slots, head_dim, cache_dtype), rtol=1e-12, atol=1e-12)
    key, value = codes.held(slots[..., :head_dim], slots[..., head_dim:])
    assert torch.equal(torch.cat([key, value], dim=-1), found)


@pytest.mark.parametrize("cache_dtype", AFFINE)
def test_an_error_is_half_a_step_at_most(cache_dtype):
    """Of a value, whose groups are those of its channels; the largest and the least are not cut off."""
    codes, slots = Codes(cache_dtype, 128), draw(40, 3, 256)
    value, found = (
        x[..., 128:].unflatten(-1, (2, 64)) for x in (slots, codes.decode(codes.encode(slots), torch.float64))
    )
    reach = value.amax(-1) - value.amin(-1)
    offset = value.amin(-1).abs()
    # A step and an offset are rounded to 8 digits, outwards.
    step = (reach + offset / 128) / codes.most * (1 + 1 / 128)
    error = (found - value).abs().amax(-1)
    assert bool((error <= step / 2).all()) and bool((error > step / 5).any())


def test_fp8_keeps_four_digits():
    codes, slots = Codes("fp8", 64), draw(40, 3, 128)
    slots = slots.clamp(-448, 448)
    error = (codes.decode(codes.encode(slots), torch.float64) - slots).abs()
    assert bool((error <= (slots.abs() / 16).clamp(min=2.0**-10)).all()) and error.max() > 1


@by_cache_dtype
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=["fp32", "bf16"])
def test_zeros_and_equal_channels(cache_dtype, dtype):
    codes = Codes(cache_dtype, 64)
    assert torch.equal(codes.decode(codes.encode(torch.zeros(3, 128, dtype=dtype))), torch.zeros(3, 128))
    ones = torch.ones(3, 128, dtype=dtype) * torch.tensor([1.0, -2.5, 224.0], dtype=dtype)[:, None]
    torch.testing.assert_close(
        codes.decode(codes.encode(ones)), ones.float(), rtol=0, atol=0 if cache_dtype == "fp8" else 8
    )
    assert torch.equal(codes.decode(codes.encode(ones))[:, 64:], ones[:, 64:].float())


@by_cache_dtype
def test_what_is_too_small_or_too_large_stays_finite(cache_dtype):
    codes = Codes(cache_dtype, 8)
    for number in (1e-45, 1e-40, 2.0**-126, 3.0e38, float("inf")):
        slots = Draw(1).normal(7, 16).float() * number
        slots[0] = torch.tensor([number, -number] * 8)
        found = codes.decode(codes.encode(slots))
        assert bool(found.isfinite().all()) and found.abs().max() <= 3 * LARGEST
        if number < 1e-30:
            assert (found - slots).abs().max() < 1e-37
    assert codes.decode(codes.encode(torch.full((1, 16), float("inf")))).amin() >= 448 - 1e-3


@by_cache_dtype
def test_a_nan_stays_one_and_harms_no_other_slot(cache_dtype):
    codes, slots = Codes(cache_dtype, 64), draw(5, 3, 128)
    expected = codes.decode(codes.encode(slots))
    slots[2, :, 70] = float("nan")
    found = codes.decode(codes.encode(slots))
    assert found[2, :, 70].isnan().all()
    assert torch.equal(found[[0, 1, 3, 4]], expected[[0, 1, 3, 4]])


def test_bytes():
    assert [Codes(name, 64).slot_bytes for name in CACHE_DTYPES] == [136, 128, 72]
    assert [Codes(name, 128).slot_bytes for name in CACHE_DTYPES] == [272, 256, 144]


@by_cache_dtype
def test_a_channel_that_queries_do_not_see_is_given_back_as_zero(cache_dtype):
    codes, slots = Codes(cache_dtype, 64, clears_last_channel=True), draw(5, 3, 128)
    found = codes.decode(codes.encode(slots))
    assert not found[..., 63].any()
    slots[..., 63] = 0
    expected = Codes(cache_dtype, 64).decode(Codes(cache_dtype, 64).encode(slots))
    expected[..., 63] = 0
    assert torch.equal(found, expected)


@pytest.mark.parametrize("value", ["int2", "INT4", 4, torch.int8, ""])
def test_another_name_is_refused(value):
    with pytest.raises(ValueError, match="cache_dtype must be int8, fp8, int4, or none for the model's own dtype, got"):
        check_cache_dtype("cache_dtype", value)
