"""Attention to keys that fade, each by its own logit: log(1 - sigmoid(logit)) on each key (DMS, arXiv 2506.05345)."""

import torch
from torch import Tensor

from megatron_dmc.ops.attention.diagonal import FarGradients
from megatron_dmc.ops.attention.documents import Documents
from megatron_dmc.ops.attention.flash import fading_bias, flash_backward, flash_forward


def faded_forward(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    fading: Tensor | None,
    softmax_scale: float,
    bias_channel: int | None,
    documents: Documents | None = None,
    *,
    causal: bool = True,
) -> tuple[Tensor, Tensor]:
    """Query i sees key j (j <= i if causal) with score q_i . k_j scale + log(1 - sigmoid(fading_j)).

    Args:
        query: [batch, seq_q, heads, head_dim].
        key, value: [batch, seq_k, kv_heads, head_dim].
        fading: [batch, seq_k, kv_heads] in float32 or wider; None: no key fades.

    Returns:
        out [batch, seq_q, heads, head_dim], log-sum-exp [batch, seq_q, heads].
    """
    return flash_forward(
        query,
        key,
        value,
        None if fading is None else fading_bias(fading),
        causal=causal,
        softmax_scale=softmax_scale,
        bias_channel=bias_channel,
        documents=documents,
    )


def faded_backward(
    grad_out: Tensor,
    query: Tensor,
    key: Tensor,
    value: Tensor,
    fading: Tensor | None,
    out: Tensor,
    lse: Tensor,
    softmax_scale: float,
    bias_channel: int | None,
    documents: Documents | None = None,
    *,
    causal: bool = True,
) -> FarGradients:
    """The gradients, given the final out and lse of a softmax that may have been joined with further terms."""
    d_query, d_key, d_value, d_bias = flash_backward(
        grad_out,
        query,
        key,
        value,
        out,
        lse,
        None if fading is None else fading_bias(fading),
        causal=causal,
        softmax_scale=softmax_scale,
        bias_channel=bias_channel,
        documents=documents,
    )
    d_fading = None if fading is None or d_bias is None else -d_bias * torch.sigmoid(fading)
    return FarGradients(d_query, d_key, d_value, d_fading)
