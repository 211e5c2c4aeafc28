"""Philox4x32-10 on whole tensors, on any device."""

from collections.abc import Sequence

import torch
from torch import Tensor

from megatron_dmc.ops.noise.naive import KEY_STEPS, MULTIPLIERS, ROUNDS, WORD


def _multiply(multiplier: int, word: Tensor) -> tuple[Tensor, Tensor]:
    """High and low 32 bits of a 64-bit product. int64 wraps around, and all 64 bits of the wrapped product are right."""
    product = word * multiplier
    return (product >> 32) & WORD, product & WORD


def philox(c0: Tensor, c1: Tensor, c2: Tensor, c3: Tensor, k0: int, k1: int) -> tuple[Tensor, ...]:
    """Four words (int64 holding 32 bits) for every element of the broadcast counters."""
    for _ in range(ROUNDS):
        high0, low0 = _multiply(MULTIPLIERS[0], c0)
        high1, low1 = _multiply(MULTIPLIERS[1], c2)
        c0, c1, c2, c3 = high1 ^ c1 ^ k0, low1, high0 ^ c3 ^ k1, low0
        k0, k1 = (k0 + KEY_STEPS[0]) & WORD, (k1 + KEY_STEPS[1]) & WORD
    return c0, c1, c2, c3


def logistic_noise(
    seed: int, sample_index: Tensor, layer: int, kv_heads: Sequence[int] | Tensor, positions: Tensor
) -> Tensor:
    """As the public function."""
    device = sample_index.device
    heads = _head_numbers(kv_heads, device)
    # One Philox call serves four neighbouring positions. Positions on the host are grouped there, without a wait for a GPU.
    blocks, block_of = torch.unique(positions // 4, return_inverse=True)
    word_of = _without_wait(block_of * 4 + positions % 4, device)
    blocks = _without_wait(blocks, device)
    shape = (len(sample_index), len(blocks), len(heads))
    counter = (
        blocks[None, :, None].expand(shape),
        (layer << 16 | heads)[None, None, :].expand(shape),
        (sample_index & WORD)[:, None, None].expand(shape),
        (sample_index >> 32)[:, None, None].expand(shape),
    )
    words = torch.stack(philox(*counter, seed & WORD, seed >> 32), dim=2)  # [B, blocks, 4, H]
    words = words.flatten(1, 2)[:, word_of]
    u = ((words >> 9).float() + 0.5) / 2**23
    return torch.log(u) - torch.log1p(-u)


def _head_numbers(kv_heads: Sequence[int] | Tensor, device: torch.device) -> Tensor:
    """int64 [kv_heads]. A range, which layers give, is counted on the device: nothing is copied."""
    if isinstance(kv_heads, range):
        return torch.arange(kv_heads.start, kv_heads.stop, kv_heads.step, device=device)
    return _without_wait(torch.as_tensor(kv_heads, dtype=torch.int64), device)


def _without_wait(x: Tensor, device: torch.device) -> Tensor:
    """On the device. A copy from the host does not wait for the device; a copy to the host must, or it is read too early."""
    return x.to(device, non_blocking=x.device.type == "cpu")
