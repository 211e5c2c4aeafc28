"""The channel that carries a bias to a kernel, and its gradient back."""

from collections.abc import Sequence

import torch
from torch import Tensor

from megatron_dmc.ops.attention.types import Gradients


def with_channel(x: Tensor, channel: int, content: float | Tensor) -> Tensor:
    """A copy of x with one channel replaced."""
    x = x.clone()
    x[..., channel] = content
    return x


def split_bias(grads: Sequence[Tensor], channel: int | None, head_dim: int, factor: float) -> Gradients:
    """Takes the bias' gradient out of its channel.

    Args:
        grads: of query, key and value, the latter two [batch, seq_k, kv_heads, head_dim or more].
        channel: None: there was no bias.
        factor: 1 / (softmax scale * what the query holds in the channel).
    """
    query, key, value = grads
    if channel is None:
        return Gradients(query, key, value, None)
    grad_bias = key[..., channel].float() * factor if key.dtype != torch.float64 else key[..., channel] * factor
    if channel < head_dim:
        query[..., channel] = 0
        key[..., channel] = 0
    return Gradients(query[..., :head_dim], key[..., :head_dim], value[..., :head_dim], grad_bias)
