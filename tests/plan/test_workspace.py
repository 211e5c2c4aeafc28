"""What FlashAttention 2's backward pass allocates is counted where a plan runs it."""

from collections.abc import Callable
from dataclasses import replace
from typing import Any

import pytest
import torch

from megatron_dmc.ops.attention.flash import flash_backward
from megatron_dmc.ops.attention.types import Attended, BiasedKeys, KernelSettings
from megatron_dmc.plan.footprint import _Watch, _windowed_tokens
from megatron_dmc.plan.rank import META, fake_rank
from megatron_dmc.plan.workspace import flash_attention_2
from megatron_dmc.recipe import ParallelConfig
from tests.support.planning import tiny

Elsewhere = Callable[..., Any]
MIB = 2**20


def test_one_layer_of_a_long_sample() -> None:
    """32 query heads on 8 KV heads, 128 channels and 8 that carry the bias: 768 MiB of dq_accum, 544 of dK and dV."""
    softmax_d = 32 * 32768 * 4
    assert flash_attention_2(1, 32768, 32768, 32, 8, 136) == 768 * MIB + 544 * MIB + softmax_d
    # No copy per query head where every one has its own KV head; a head of 128 is not rounded up.
    assert flash_attention_2(1, 32768, 32768, 32, 32, 128) == 512 * MIB + softmax_d
    # A sequence is rounded up to 128, a head below 128 channels to 32.
    assert flash_attention_2(2, 100, 60, 4, 2, 80) == 2 * 4 * 128 * (96 + 1) * 4 + 2 * 2 * 2 * 60 * 4 * 80


def worst_moment(form: str) -> int:
    """Bytes that one backward pass needs at its worst moment, beside the tensors that it was given."""
    seq, heads, kv_heads, head_dim = 32768, 32, 8, 128
    with fake_rank(ParallelConfig(), 1, 0):

        def made(*shape: int, dtype: torch.dtype = torch.bfloat16) -> torch.Tensor:
            return torch.empty(1, seq, *shape, dtype=dtype, device=META)

        query, key = made(heads, head_dim), made(kv_heads, head_dim)
        value, grad_out = torch.empty_like(key), made(heads, head_dim)
        final = Attended(torch.empty_like(query), made(heads, dtype=torch.float32))
        bias = None if form == "window" else made(kv_heads, dtype=torch.float32)
        settings = {
            "window": KernelSettings(0.1, window=256),
            "free channel": KernelSettings(0.1, bias_channel=-1),
            "no free channel": KernelSettings(0.1),
        }[form]
        with _Watch(windowed_tokens=seq) as watch:
            flash_backward(grad_out, query, BiasedKeys(key, value, bias), final, settings)
    return watch.peak


@pytest.mark.parametrize(
    ("form", "width"), [("no free channel", 136), ("free channel", 128), ("window", 128)], ids=lambda x: str(x)
)
def test_a_backward_pass_holds_its_workspace(elsewhere: Elsewhere, form: str, width: int) -> None:
    peak = elsewhere(worst_moment, form)
    results = 2 * 32768 * width * (32 + 2 * 8)
    # Query, key, value, out and its gradient are copied where a bias travels with them.
    copies = 0 if form == "window" else 2 * 32768 * width * (3 * 32 + 2 * 8)
    workspace = flash_attention_2(1, 32768, 32768, 32, 8, width)
    assert peak == pytest.approx(results + copies + workspace, rel=0.05)


def test_tokens_of_one_pass_over_the_window() -> None:
    """All samples at once; under context parallelism one of a rank's two chunks, and what fills its first window."""
    recipe = tiny("training.micro_batch_size=2", "dmc.local_window=16")
    assert _windowed_tokens(recipe) == 2 * 128
    halves = replace(recipe, parallel=ParallelConfig(context_parallel_size=2))
    assert _windowed_tokens(halves) == 2 * (128 // 4 + 15)
