"""What is checked and timed, on a GPU and at toy size."""

from collections.abc import Sequence
from dataclasses import dataclass, replace

import torch

# Attention on a GPU is bf16.
DTYPE = torch.bfloat16


@dataclass(frozen=True)
class Sizes:
    """Sizes of the parts.

    Attributes:
        check_seq: tokens where attention and the cache are compared: their float64 references are quadratic.
        pooling_seq: tokens where pooling is compared: its reference is a loop over tokens on the host.
        timed: (tokens, KV heads) at which one layer's operations are timed, at batch 1.
        decoded: (batch, tokens in the cache) at which decoding is timed.
        rounds: how often everything that is timed is called.
    """

    check_seq: int = 1029
    pooling_seq: int = 193
    heads: int = 32
    kv_heads: int = 8
    head_dim: int = 128
    local_window: int = 256
    timed: Sequence[tuple[int, int]] = ((4096, 8), (4096, 32), (32768, 8))
    decoded: Sequence[tuple[int, int]] = ((1, 8192), (8, 8192))
    step_seq: int = 2048
    step_layers: int = 4
    step_hidden: int = 512
    rounds: int = 7


FULL = Sizes()
TOY = replace(
    FULL,
    check_seq=97,
    pooling_seq=33,
    heads=4,
    kv_heads=2,
    head_dim=16,
    local_window=40,
    timed=((128, 2),),
    decoded=((1, 64),),
    step_seq=64,
    step_layers=2,
    step_hidden=128,
    rounds=1,
)
