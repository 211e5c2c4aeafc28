"""What attention's backward kernel on a GPU allocates beside its results, backend by backend.

A plan runs on the meta device, where attention takes the CPU's kernel; that one needs no such memory.
"""

from typing import Any

import torch
from torch import Tensor

aten = torch.ops.aten


def flash_attention_2(
    batch: int, queries: int, keys: int, heads: int, kv_heads: int, head_dim: int, *, itemsize: int = 2
) -> int:
    """Bytes that torch's FlashAttention 2 allocates for one backward pass.

    Source: ``mha_bwd`` in torch's ``aten/src/ATen/native/transformers/cuda/flash_attn/flash_api.cpp`` (read in 2.11 and
    2.13): ``dq_accum`` in float32, queries rounded up to 128 and channels to 32 (above 128 channels to 64); ``softmax_d`` in
    float32; and where query heads share KV heads ``dk_expanded`` and ``dv_expanded`` with a copy for every query head.
    """
    rows = batch * heads * _up(queries, 128)
    accumulated = 4 * rows * (_up(head_dim, 32 if head_dim <= 128 else 64) + 1)
    expanded = 2 * itemsize * batch * keys * heads * head_dim if kv_heads != heads else 0
    return accumulated + expanded


def attention_workspace(func: Any, args: tuple[Any, ...], kwargs: dict[str, Any], windowed_tokens: int) -> int:
    """Bytes that a GPU's kernel holds on top of an operation's arguments and results; 0 where there are none.

    Args:
        windowed_tokens: queries of one pass over a local window on a GPU; the CPU cuts them into short rows.
    """
    if func is not aten._scaled_dot_product_flash_attention_for_cpu_backward.default:
        return 0
    grad_out, _, key = args[:3]
    batch, heads, queries, channels = grad_out.shape
    _, kv_heads, keys, _ = key.shape
    itemsize = grad_out.element_size()
    mask: Tensor | None = kwargs.get("attn_mask")
    if mask is not None and mask.shape[-2] > 1:  # the band of a local window, not a bias per key
        return flash_attention_2(1, windowed_tokens, windowed_tokens, heads, kv_heads, channels, itemsize=itemsize)
    head_dim = _up(channels, 8)
    copies = 0
    if mask is not None:
        # A GPU carries the bias in channels of copies (ops/attention/flash_cuda.py, _carry_bias). With a free channel
        # these are the CPU's query, and key, value, out and its gradient besides; else all of these and the results are wider.
        free = head_dim == channels
        rows = batch * (queries * heads + keys * kv_heads)
        copies = itemsize * rows * (2 * head_dim if free else 4 * (head_dim - channels))
    return copies + flash_attention_2(batch, queries, keys, heads, kv_heads, head_dim, itemsize=itemsize)


def _up(size: int, multiple: int) -> int:
    return -(-size // multiple) * multiple
