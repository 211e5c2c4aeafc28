"""One key more for each query, joined to a softmax by its logarithm."""

from typing import NamedTuple

import torch
from torch import Tensor

from megatron_dmc.ops.attention.types import Attended


class OneKey(NamedTuple):
    """A key for each query: query i sees key i with score softmax_scale q_i . k_i + log_weight_i, and no other query does.

    Attributes:
        key, value: [batch, seq, kv_heads, head_dim].
        log_weight: [batch, seq, kv_heads] in float32 or wider; -inf: the query sees nothing.
    """

    key: Tensor
    value: Tensor
    log_weight: Tensor


def join_one_key(query: Tensor, attended: Attended, one: OneKey, softmax_scale: float) -> Attended:
    """One softmax over what was attended to and the key; query [batch, seq, heads, head_dim]."""
    kv_heads = one.key.shape[2]
    grouped_query, out, lse = (_per_group(x, kv_heads) for x in (query, *attended))
    score = _scores(grouped_query, one, softmax_scale, lse.dtype)
    joined = torch.logaddexp(lse, score)
    # lerp: out + w (value - out), the key's weight w = exp(score - joined)
    weight = torch.exp(score - joined).to(out.dtype)[..., None]
    out = torch.lerp(out, one.value[..., None, :].expand_as(out), weight).flatten(2, 3)
    return Attended(out, joined.flatten(2, 3))


def add_one_key_gradients(
    into: tuple[Tensor, Tensor, Tensor],
    grad_out: Tensor,
    query: Tensor,
    one: OneKey,
    final: Attended,
    softmax_scale: float,
) -> Tensor:
    """Gradients, given the final result of a softmax that may have been joined with further terms.

    Args:
        into: gradients of the query, the key and the value, to which these are added in place.

    Returns:
        The gradient of log_weight.
    """
    key, value = one.key, one.value
    d_query, d_key, d_value = into
    kv_heads = key.shape[2]
    grouped_query, grouped_grad = _per_group(query, kv_heads), _per_group(grad_out, kv_heads)
    score = _scores(grouped_query, one, softmax_scale, final.lse.dtype)
    probability = torch.exp(score - _per_group(final.lse, kv_heads))
    # p_i (dout_i . v_i - dout_i . out_i)
    difference = value[..., None, :] - _per_group(final.out, kv_heads)
    d_score = difference.mul_(grouped_grad).sum(-1, dtype=final.lse.dtype)
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
    return d_score.sum(-1)


def _scores(grouped_query: Tensor, one: OneKey, softmax_scale: float, dtype: torch.dtype) -> Tensor:
    """[batch, seq, kv_heads, group]"""
    scores = softmax_scale * (grouped_query * one.key[..., None, :]).sum(-1, dtype=dtype)
    scores += one.log_weight[..., None]
    return scores


def _per_group(x: Tensor, kv_heads: int) -> Tensor:
    """[batch, seq, heads, ...] -> [batch, seq, kv_heads, group, ...], a view."""
    return x.unflatten(2, (kv_heads, -1))
