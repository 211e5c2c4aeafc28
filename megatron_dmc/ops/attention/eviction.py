"""Attention to keys that may have been thrown away: a bias log(1 - alpha_j) on each key (DMS, arXiv 2506.05345)."""

import torch
import torch.nn.functional as F
from torch import Tensor

from megatron_dmc.ops.attention.diagonal import KeyGradients
from megatron_dmc.ops.attention.flash import HIDDEN, flash_backward, flash_forward


def eviction_forward(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    merge_logits: Tensor,
    softmax_scale: float,
    bias_channel: int | None,
) -> tuple[Tensor, Tensor]:
    """Query i sees key j <= i with score q_i . k_j scale + log(1 - alpha_j); out and log-sum-exp, as diagonal_forward."""
    key_bias = F.logsigmoid(-_evictable(merge_logits, query.dtype)).clamp(min=HIDDEN)
    return flash_forward(
        query, key, value, key_bias, causal=True, softmax_scale=softmax_scale, bias_channel=bias_channel
    )


def eviction_backward(
    grad_out: Tensor,
    query: Tensor,
    key: Tensor,
    value: Tensor,
    merge_logits: Tensor,
    out: Tensor,
    lse: Tensor,
    softmax_scale: float,
    bias_channel: int | None,
) -> KeyGradients:
    """The gradients, given the final out and lse of a softmax that may have been joined with further terms."""
    logits = _evictable(merge_logits, query.dtype)
    d_query, d_key, d_value, d_bias = flash_backward(
        grad_out,
        query,
        key,
        value,
        out,
        lse,
        F.logsigmoid(-logits).clamp(min=HIDDEN),
        causal=True,
        softmax_scale=softmax_scale,
        bias_channel=bias_channel,
    )
    assert d_bias is not None
    return KeyGradients(d_query, d_key, d_value, (-d_bias * torch.sigmoid(logits)).to(merge_logits.dtype))


def _evictable(merge_logits: Tensor, dtype: torch.dtype) -> Tensor:
    """The first token is never thrown away."""
    logits = merge_logits.to(torch.promote_types(dtype, torch.float32))
    return F.pad(logits[:, 1:], (0, 0, 1, 0), value=float("-inf"))
