"""Tensors and forms that several parts take."""

from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from gpu.sizes import DTYPE, Sizes
from megatron_dmc.ops.attention import windowed_dmc_attention
from megatron_dmc.ops.attention.types import Operation

ATTENTION_INPUTS = ("query", "key", "value", "pooled_key", "pooled_value", "merge_logits", "omega")


def attention_inputs(seq: int, sizes: Sizes, device: str, hard: bool, free: bool) -> list[Tensor]:
    """ATTENTION_INPUTS at batch 1; the pooled ones are drawn as well.

    Args:
        hard: decisions are binary.
        free: the last channel of query and keys is zero, so that it may carry the bias.
    """
    generator = torch.Generator().manual_seed(0)

    def draw(heads: int, *head_dim: int) -> Tensor:
        return torch.randn(1, seq, heads, *head_dim, generator=generator)

    query = draw(sizes.heads, sizes.head_dim)
    key, value, pooled_key, pooled_value = (draw(sizes.kv_heads, sizes.head_dim) for _ in range(4))
    if free:
        query[..., -1], key[..., -1], pooled_key[..., -1] = 0, 0, 0
    merge_logits = 4 * draw(sizes.kv_heads)
    if hard:
        merge_logits = merge_logits.sign() * float("inf")
    states = (query, key, value, pooled_key, pooled_value)
    return [*(x.to(device, DTYPE) for x in states), merge_logits.to(device), draw(sizes.kv_heads).exp().to(device)]


def pooling_inputs(seq: int, sizes: Sizes, device: str) -> list[Tensor]:
    """Key, value, alpha (soft and binary), omega, at batch 1."""
    generator = torch.Generator().manual_seed(0)
    key, value = (torch.randn(1, seq, sizes.kv_heads, sizes.head_dim, generator=generator) for _ in range(2))
    merge_logits = 5 * torch.randn(1, seq, sizes.kv_heads, generator=generator)
    alpha = torch.where(merge_logits.abs() > 5, (merge_logits > 0).float(), torch.sigmoid(merge_logits))
    omega = torch.sigmoid(torch.randn(1, seq, sizes.kv_heads, generator=generator)) + 2**-7
    return [key.to(device, DTYPE), value.to(device, DTYPE), alpha.to(device), omega.to(device)]


def attention_forms(sizes: Sizes) -> dict[str, dict[str, Any]]:
    """Options of dmc_form. Without a free channel first: so are the recipes with the ``projection`` source."""
    forms: dict[str, dict[str, Any]] = {
        "attention": {"local_window": 0},
        "attention, window, merge": {"local_window": sizes.local_window, "operation": "merge"},
        "attention, window, evict": {"local_window": sizes.local_window, "operation": "evict"},
        "attention, window, absorb": {"local_window": sizes.local_window, "operation": "absorb"},
    }
    channels = {"no free channel": None, "free channel": -1}
    return {
        f"{form}, {label}": {**options, "bias_channel": channel}
        for label, channel in channels.items()
        for form, options in forms.items()
    }


def dmc_form(*inputs: Tensor, operation: Operation = "merge", **options: Any) -> Tensor:
    """windowed_dmc_attention of ATTENTION_INPUTS, whose omega only ``absorb`` takes."""
    *states, omega = inputs
    return windowed_dmc_attention(
        *states, operation=operation, omega=omega if operation == "absorb" else None, **options
    )


def plain_attention(query: Tensor, key: Tensor, value: Tensor, *, causal: bool = True) -> Tensor:
    """Tensors as dmc_attention's. torch picks the kernel, or sdpa_kernel does."""
    query, key, value = (x.transpose(1, 2) for x in (query, key, value))
    return F.scaled_dot_product_attention(query, key, value, is_causal=causal, enable_gqa=True).transpose(1, 2)


def decode_forms(device: str) -> tuple[str, ...]:
    """What a decoding step can run on."""
    return ("triton", "torch") if device == "cuda" else ("torch",)
