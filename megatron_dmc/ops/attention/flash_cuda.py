"""torch's flash kernels for a GPU. They know a window and documents, but no bias: it travels in a channel, in both passes."""

import math
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from megatron_dmc.ops.attention.bias_channel import split_bias, with_channel
from megatron_dmc.ops.attention.documents import Documents
from megatron_dmc.ops.attention.types import Attended, BiasedKeys, Gradients, KernelSettings

aten = torch.ops.aten


def cuda_forward(query: Tensor, keys: BiasedKeys, settings: KernelSettings) -> Attended:
    """flash_forward on a GPU."""
    _check_dtype(query)
    head_dim = query.shape[-1]
    key, value, bias = keys
    if bias is not None:
        query, key, _, _ = _carry_bias(query, key, bias, settings)
        value = F.pad(value, (0, query.shape[-1] - head_dim))
    tensors, places = _places(settings.documents, query, key, value)
    out, lse, *_ = aten._flash_attention_forward(
        *tensors,
        *places,
        0.0,
        settings.causal,
        False,
        scale=settings.softmax_scale,
        **_window_sizes(settings.window),
    )
    if settings.documents is not None:
        out, lse = out[None], lse[None]
    return Attended(out[..., :head_dim], lse.transpose(1, 2))


def cuda_backward(
    grad_out: Tensor, query: Tensor, keys: BiasedKeys, final: Attended, settings: KernelSettings
) -> Gradients:
    """flash_backward on a GPU."""
    _check_dtype(query)
    head_dim = query.shape[-1]
    channel, carrier = None, 1.0
    key, value, bias = keys
    out = final.out
    if bias is not None:
        query, key, channel, carrier = _carry_bias(query, key, bias, settings)
        extra = (0, query.shape[-1] - head_dim)
        value, grad_out, out = F.pad(value, extra), F.pad(grad_out, extra), F.pad(out, extra)
    no_dropout = torch.zeros((), dtype=torch.uint64, device=query.device)
    lse = final.lse.transpose(1, 2).contiguous()  # [batch, heads, seq], or [heads, tokens]
    tensors, places = _places(settings.documents, grad_out.contiguous(), query, key, value, out.contiguous(), lse)
    grads = aten._flash_attention_backward(
        *tensors,
        *places,
        0.0,
        settings.causal,
        no_dropout,
        no_dropout,
        scale=settings.softmax_scale,
        **_window_sizes(settings.window),
    )
    if settings.documents is not None:
        grads = [x[None] for x in grads]
    return split_bias(grads, channel, head_dim, 1 / (settings.softmax_scale * carrier))


def _check_dtype(query: Tensor) -> None:
    if query.dtype not in (torch.bfloat16, torch.float16):
        raise TypeError(
            f"attention on a GPU needs bfloat16 or float16, got {query.dtype}: load the model with dtype=torch.bfloat16 (in a "
            "recipe: training.bf16 true)"
        )


def _carry_bias(
    query: Tensor, key: Tensor, bias: Tensor, settings: KernelSettings
) -> tuple[Tensor, Tensor, int, float]:
    """Query and key with p and bias / (scale p) in a channel, that channel, and p: a power of two near 1 / scale, so that
    it is exact in bf16."""
    carrier = 2.0 ** round(-math.log2(settings.softmax_scale))
    content = bias / (settings.softmax_scale * carrier)
    if settings.bias_channel is None:
        # Flash kernels need a multiple of 8 channels. Two of the new ones carry the bias with twice the digits.
        high = content.to(key.dtype)
        low = (content - high.float()).to(key.dtype)
        carriers = torch.full((*query.shape[:-1], 2), carrier, dtype=query.dtype, device=query.device)
        query = torch.cat([query, F.pad(carriers, (0, 6))], dim=-1)
        key = torch.cat([key, F.pad(torch.stack([high, low], dim=-1), (0, 6))], dim=-1)
        return query, key, query.shape[-1] - 8, carrier
    channel = settings.bias_channel % query.shape[-1]
    return with_channel(query, channel, carrier), with_channel(key, channel, content.to(key.dtype)), channel, carrier


def _window_sizes(window: int | None) -> dict[str, int]:
    return {} if window is None else {"window_size_left": window - 1, "window_size_right": 0}


def _places(documents: Documents | None, *tensors: Tensor) -> tuple[list[Tensor], list[Any]]:
    """The kernel's tensors, and its (cum_seq_q, cum_seq_k, max_q, max_k)."""
    if documents is None:
        query, key = tensors[:2] if len(tensors) == 3 else tensors[1:3]
        return list(tensors), [None, None, query.shape[1], key.shape[1]]
    ends, longest = documents.cu_seqlens, documents.longest
    return [x[0] for x in tensors], [ends, ends, longest, longest]
