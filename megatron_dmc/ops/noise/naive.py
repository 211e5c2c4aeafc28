"""Philox4x32-10 in Python integers, one number at a time: the oracle."""

import math
from collections.abc import Sequence

import torch
from torch import Tensor

WORD = 0xFFFFFFFF
MULTIPLIERS = (0xD2511F53, 0xCD9E8D57)
KEY_STEPS = (0x9E3779B9, 0xBB67AE85)
ROUNDS = 10


def philox(counter: Sequence[int], key: Sequence[int]) -> list[int]:
    """Four 32-bit words from a counter of four and a key of two (Salmon et al., SC 2011, section 3)."""
    c0, c1, c2, c3 = counter
    k0, k1 = key
    for _ in range(ROUNDS):
        p0, p1 = MULTIPLIERS[0] * c0, MULTIPLIERS[1] * c2
        c0, c1, c2, c3 = (p1 >> 32) ^ c1 ^ k0, p1 & WORD, (p0 >> 32) ^ c3 ^ k1, p0 & WORD
        k0, k1 = (k0 + KEY_STEPS[0]) & WORD, (k1 + KEY_STEPS[1]) & WORD
    return [c0, c1, c2, c3]


def logistic_noise(
    seed: int, sample_index: Tensor, layer: int, kv_heads: Sequence[int] | Tensor, positions: Tensor
) -> Tensor:
    """As the public function: the word of each position as a uniform number u, and log u - log(1 - u)."""
    noise = torch.empty(len(sample_index), len(positions), len(kv_heads))
    for b, sample in enumerate(sample_index.tolist()):
        for t, position in enumerate(positions.tolist()):
            for h, head in enumerate(torch.as_tensor(kv_heads).tolist()):
                counter = (position // 4, layer << 16 | head, sample & WORD, sample >> 32)
                word = philox(counter, (seed & WORD, seed >> 32))[position % 4]
                # 23 bits, so that u and 1 - u are exact in float32 and neither is 0
                u = ((word >> 9) + 0.5) / 2**23
                noise[b, t, h] = math.log(u) - math.log1p(-u)
    return noise
