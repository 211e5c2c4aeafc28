"""later_attention: its arguments are checked, then an implementation runs."""

import math

from torch import Tensor

from megatron_dmc.ops.backend import choose
from megatron_dmc.ops.later_attention import naive
from megatron_dmc.ops.later_attention.torch import later_attention as torch_later_attention
from megatron_dmc.ops.later_attention.types import Places


def later_attention(
    query: Tensor,
    key: Tensor,
    *,
    query_places: Places,
    key_places: Places,
    query_weight: Tensor,
    key_weight: Tensor,
    local_window: int,
    softmax_scale: float | None = None,
    backend: str = "auto",
) -> Tensor:
    """The logarithm of the largest weighted attention that any later query pays to each key.

    score_j = log max over i, h of a_hij u_hj / v_i, over all queries i of the same document with i - j >= local_window and
    all query heads h that share the KV head; a_hij is causal softmax attention to all keys up to i. With u_hj the norm of what
    head h adds for value j, and v_i the norm of the query's hidden state, it is the score of KVzip+ and KVzap (Kim et al.,
    arXiv 2505.23416; arXiv 2601.07891). No tensor grows with s x s. Not differentiable.

    Args:
        query: [batch, queries, heads, head_dim], rotated: any part of the sequence's tokens.
        key: [batch, seq, kv_heads, head_dim], rotated: all of the sequence's; kv_heads divides heads.
        query_places, key_places: where they stand.
        query_weight: log v, [batch, queries].
        key_weight: log u, [batch, seq, heads].
        local_window: >= 0, tokens.
        softmax_scale: 1 / sqrt(head_dim) by default.
        backend: "auto", "torch", or "naive", the oracle with its s x s attention.

    Returns:
        [batch, seq, kv_heads] in float32 or wider; -inf where no query is late enough.

    Raises:
        ValueError: shapes do not fit or the backend is unknown.
    """
    batch, seq, kv_heads, head_dim = key.shape
    heads = query.shape[2]
    shapes = (query.shape[0], query.shape[3], tuple(query_weight.shape), tuple(key_weight.shape))
    if shapes != (batch, head_dim, tuple(query.shape[:2]), (batch, seq, heads)) or heads % kv_heads:
        raise ValueError(
            "later_attention needs query [b, n, heads, d], key [b, s, kv_heads, d], query_weight [b, n] and key_weight "
            f"[b, s, heads] with kv_heads dividing heads; got {tuple(query.shape)}, {tuple(key.shape)}, "
            f"{tuple(query_weight.shape)}, {tuple(key_weight.shape)}"
        )
    if local_window < 0:
        raise ValueError(f"local_window must be >= 0, got {local_window}")
    implementation = choose(backend, {"torch": torch_later_attention, "naive": naive.later_attention})
    return implementation(
        query,
        key,
        query_places=query_places,
        key_places=key_places,
        query_weight=query_weight,
        key_weight=key_weight,
        local_window=local_window,
        softmax_scale=1 / math.sqrt(head_dim) if softmax_scale is None else softmax_scale,
    )
