"""later_attention: its arguments are checked, then an implementation runs."""

import math

from torch import Tensor

from megatron_dmc.ops.backend import choose
from megatron_dmc.ops.later_attention import naive
from megatron_dmc.ops.later_attention.torch import later_attention as torch_later_attention
from megatron_dmc.ops.later_attention.types import Tokens


def later_attention(
    queries: Tokens, keys: Tokens, *, local_window: int, softmax_scale: float | None = None, backend: str = "auto"
) -> Tensor:
    """The logarithm of the largest weighted attention that any later query pays to each key.

    score_j = log max over i, h of a_hij u_hj / v_i, over all queries i of the same document with i - j >= local_window and
    all query heads h that share the KV head; a_hij is causal softmax attention to all keys up to i. With u_hj the norm of what
    head h adds for value j, and v_i the norm of the query's hidden state, it is the score of KVzip+ and KVzap (Kim et al.,
    arXiv 2505.23416; arXiv 2601.07891). No tensor grows with s x s. Not differentiable.

    Args:
        queries: any part of the sequence's tokens, [batch, queries, ...].
        keys: all of the sequence's, [batch, seq, ...]; their heads divide the queries'.
        local_window: >= 0, tokens.
        softmax_scale: 1 / sqrt(head_dim) by default.
        backend: "auto", "torch", or "naive", the oracle with its s x s attention.

    Returns:
        [batch, seq, kv_heads] in float32 or wider; -inf where no query is late enough.

    Raises:
        ValueError: shapes do not fit or the backend is unknown.
    """
    batch, seq, kv_heads, head_dim = keys.vectors.shape
    _, count, heads, _ = queries.vectors.shape
    shapes = [tuple(x.shape) for each in (queries, keys) for x in (each.vectors, each.log_weight)]
    wanted = [(batch, count, heads, head_dim), (batch, count), (batch, seq, kv_heads, head_dim), (batch, seq, heads)]
    if shapes != wanted or heads % kv_heads:
        raise ValueError(
            "later_attention needs queries [b, n, heads, d] and [b, n], keys [b, s, kv_heads, d] and [b, s, heads], with "
            f"kv_heads dividing heads; got {', '.join(map(str, shapes))}"
        )
    if local_window < 0:
        raise ValueError(f"local_window must be >= 0, got {local_window}")
    implementation = choose(backend, {"torch": torch_later_attention, "naive": naive.later_attention})
    return implementation(
        queries, keys, local_window, 1 / math.sqrt(head_dim) if softmax_scale is None else softmax_scale
    )
