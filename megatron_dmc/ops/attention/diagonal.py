"""DMC attention on a stock flash kernel: the kernel with a bias per key, and the diagonal put right.

The kernel gives every key j the bias log(1 - alpha_{j+1}), its own query's too. What the diagonal lacks,
exp(s_ii) = (1 - alpha_{i+1}) exp(s_ii) + alpha_{i+1} exp(s_ii), is one positive term per query, joined by its logarithm
u_i = log alpha_{i+1} + s_ii. Sums and weights are positive: nothing cancels.
"""

from typing import NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor

from megatron_dmc.ops.attention.documents import Documents
from megatron_dmc.ops.attention.flash import fading_bias, flash_backward, flash_forward


class FarGradients(NamedTuple):
    query: Tensor
    key: Tensor
    value: Tensor
    fading: Tensor | None


def diagonal_forward(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    fading: Tensor,
    softmax_scale: float,
    bias_channel: int | None,
    documents: Documents | None = None,
) -> tuple[Tensor, Tensor]:
    """out [batch, seq, heads, head_dim] and log-sum-exp [batch, seq, heads].

    Args:
        query, key, value: as dmc_attention's.
        fading: l_{j+1}, the merge logit of the token after key j, [batch, seq, kv_heads] in float32 or wider.
    """
    kv_heads = key.shape[2]
    out, lse = flash_forward(
        query,
        key,
        value,
        fading_bias(fading),
        causal=True,
        softmax_scale=softmax_scale,
        bias_channel=bias_channel,
        documents=documents,
    )
    grouped_query, grouped_out, lse = (
        _per_group(query, kv_heads),
        _per_group(out, kv_heads),
        _per_group(lse, kv_heads),
    )
    own = softmax_scale * (grouped_query * key[..., None, :]).sum(-1, dtype=lse.dtype)
    own += F.logsigmoid(fading)[..., None]
    joined = torch.logaddexp(lse, own)
    # lerp: out + w (value - out), the own slot's weight w = exp(own - joined)
    weight = torch.exp(own - joined).to(out.dtype)[..., None]
    out = torch.lerp(grouped_out, value[..., None, :].expand_as(grouped_out), weight).flatten(2, 3)
    return out, joined.flatten(2, 3)


def diagonal_backward(
    grad_out: Tensor,
    query: Tensor,
    key: Tensor,
    value: Tensor,
    fading: Tensor,
    out: Tensor,
    lse: Tensor,
    softmax_scale: float,
    bias_channel: int | None,
    documents: Documents | None = None,
) -> FarGradients:
    """The gradients, given the final out and lse of a softmax that may have been joined with further terms."""
    kv_heads = key.shape[2]
    d_query, d_key, d_value, d_bias = flash_backward(
        grad_out,
        query,
        key,
        value,
        out,
        lse,
        fading_bias(fading),
        causal=True,
        softmax_scale=softmax_scale,
        bias_channel=bias_channel,
        documents=documents,
    )
    assert d_bias is not None
    grouped_query, grouped_grad = _per_group(query, kv_heads), _per_group(grad_out, kv_heads)
    own = softmax_scale * (grouped_query * key[..., None, :]).sum(-1, dtype=lse.dtype)
    own += F.logsigmoid(fading)[..., None]
    probability = torch.exp(own - _per_group(lse, kv_heads))
    # p_i (dout_i . v_i - dout_i . out_i)
    difference = value[..., None, :] - _per_group(out, kv_heads)
    d_score = difference.mul_(grouped_grad).sum(-1, dtype=lse.dtype)
    del difference
    d_score *= probability
    scaled = (softmax_scale * d_score).to(query.dtype)[..., None]
    probability = probability.to(query.dtype)[..., None]
    # Sums over a group of one need no temporary.
    if query.shape[2] == kv_heads:
        d_value.addcmul_(probability[..., 0, :], grad_out)
        d_key.addcmul_(scaled[..., 0, :], query)
    else:
        d_value += torch.einsum("bskgo,bskgd->bskd", probability, grouped_grad)
        d_key += torch.einsum("bskgo,bskgd->bskd", scaled, grouped_query)
    _per_group(d_query, kv_heads).addcmul_(scaled, key[..., None, :])

    # 1 - alpha as a sigmoid of its own: the difference has no digits left where alpha is near 1.
    d_fading = d_score.sum(-1) * torch.sigmoid(-fading) - d_bias * torch.sigmoid(fading)
    return FarGradients(d_query, d_key, d_value, d_fading)


def _per_group(x: Tensor, kv_heads: int) -> Tensor:
    """[batch, seq, heads, ...] -> [batch, seq, kv_heads, group, ...], a view."""
    return x.unflatten(2, (kv_heads, -1))
