"""Causal attention to keys that fade from every query but their own: a flash kernel, and the diagonal put right.

The kernel gives every key j the bias log(1 - alpha_{j+1}), for its own query too. What the diagonal lacks,
exp(s_ii) = (1 - alpha_{i+1}) exp(s_ii) + alpha_{i+1} exp(s_ii), is one positive term per query, joined by its logarithm
u_i = log alpha_{i+1} + s_ii. Sums and weights are positive: nothing cancels. fade_logits_i is the logit of alpha_{i+1}.
"""

import torch
import torch.nn.functional as F
from torch import Tensor

from megatron_dmc.ops.attention.fading_keys import FarGradients, FarKeys
from megatron_dmc.ops.attention.flash import flash_backward, flash_forward
from megatron_dmc.ops.attention.types import Attended, KernelSettings


def diagonal_forward(query: Tensor, far: FarKeys, settings: KernelSettings) -> Attended:
    """Query i sees key j <= i with score softmax_scale q_i . k_j + [j < i] log(1 - sigmoid(fade_logits_j)).

    Args:
        query: [batch, seq, heads, head_dim].
        far: as long as the query; every key fades.
    """
    kv_heads = far.key.shape[2]
    out, lse = flash_forward(query, far.biased(), settings)
    grouped_query, grouped_out, lse = (_per_group(x, kv_heads) for x in (query, out, lse))
    missing = _missing_scores(grouped_query, far, settings, lse.dtype)
    joined = torch.logaddexp(lse, missing)
    # lerp: out + w (value - out), the missing term's weight w = exp(missing - joined)
    weight = torch.exp(missing - joined).to(out.dtype)[..., None]
    out = torch.lerp(grouped_out, far.value[..., None, :].expand_as(grouped_out), weight).flatten(2, 3)
    return Attended(out, joined.flatten(2, 3))


def diagonal_backward(
    grad_out: Tensor, query: Tensor, far: FarKeys, final: Attended, settings: KernelSettings
) -> FarGradients:
    """The gradients, given the final result of a softmax that may have been joined with further terms."""
    key, value, fade_logits = far
    assert fade_logits is not None
    kv_heads = key.shape[2]
    d_query, d_key, d_value, d_bias = flash_backward(grad_out, query, far.biased(), final, settings)
    assert d_bias is not None
    grouped_query, grouped_grad = _per_group(query, kv_heads), _per_group(grad_out, kv_heads)
    missing = _missing_scores(grouped_query, far, settings, final.lse.dtype)
    probability = torch.exp(missing - _per_group(final.lse, kv_heads))
    # p_i (dout_i . v_i - dout_i . out_i)
    difference = value[..., None, :] - _per_group(final.out, kv_heads)
    d_score = difference.mul_(grouped_grad).sum(-1, dtype=final.lse.dtype)
    del difference
    d_score *= probability
    scaled = (settings.softmax_scale * d_score).to(query.dtype)[..., None]
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
    d_fade = d_score.sum(-1) * torch.sigmoid(-fade_logits) - d_bias * torch.sigmoid(fade_logits)
    return FarGradients(d_query, d_key, d_value, d_fade)


def _missing_scores(grouped_query: Tensor, far: FarKeys, settings: KernelSettings, dtype: torch.dtype) -> Tensor:
    """u_i = log alpha_{i+1} + s_ii, [batch, seq, kv_heads, group]."""
    assert far.fade_logits is not None
    scores = settings.softmax_scale * (grouped_query * far.key[..., None, :]).sum(-1, dtype=dtype)
    scores += F.logsigmoid(far.fade_logits)[..., None]
    return scores


def _per_group(x: Tensor, kv_heads: int) -> Tensor:
    """[batch, seq, heads, ...] -> [batch, seq, kv_heads, group, ...], a view."""
    return x.unflatten(2, (kv_heads, -1))
