"""Attention over all intermediate states of all slots (paper, section 3.2)."""

import math
from typing import Literal, overload

from torch import Tensor

from megatron_dmc.ops.attention import naive
from megatron_dmc.ops.attention.diagonal import DiagonalAttention
from megatron_dmc.ops.attention.documents import attend_documents

__all__ = ["dmc_attention"]


@overload
def dmc_attention(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    merge_logits: Tensor,
    *,
    softmax_scale: float | None = None,
    bias_channel: int | None = None,
    document_starts: Tensor | None = None,
    return_lse: Literal[False] = False,
    backend: str = "auto",
) -> Tensor: ...


@overload
def dmc_attention(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    merge_logits: Tensor,
    *,
    softmax_scale: float | None = None,
    bias_channel: int | None = None,
    document_starts: Tensor | None = None,
    return_lse: Literal[True],
    backend: str = "auto",
) -> tuple[Tensor, Tensor]: ...


def dmc_attention(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    merge_logits: Tensor,
    *,
    softmax_scale: float | None = None,
    bias_channel: int | None = None,
    document_starts: Tensor | None = None,
    return_lse: bool = False,
    backend: str = "auto",
) -> Tensor | tuple[Tensor, Tensor]:
    """Query i sees slot state j <= i with score q_i . k~_j / sqrt(d) + [j < i] log(1 - alpha_{j+1}).

    A state that the next token is merged into fades from every later query, never from its own. With binary alpha it is
    what a decoder with the compressed cache sees. Runs on a stock flash kernel, differentiable in all four; no s x s
    tensor, K and V never expanded to the query heads.

    Args:
        query: [batch, seq, heads, head_dim], rotated. On a GPU bfloat16 or float16.
        key, value: [batch, seq, kv_heads, head_dim], pooled, the key rotated; kv_heads divides heads.
        merge_logits: [batch, seq, kv_heads], alpha = sigmoid(merge_logits); ±inf for binary decisions;
            merge_logits[:, 0] is ignored. Keep them in float32.
        softmax_scale: 1 / sqrt(head_dim) by default.
        bias_channel: a channel that is zero in query and key and may carry the bias (the ``neuron`` source); its
            gradient is zero. None: every channel counts.
        document_starts: bool [batch, seq], true at the first token of a document: no attention across.
        return_lse: also return the log-sum-exp [batch, seq, heads] (float32 or wider, no gradient).
        backend: "auto" or "torch"; "naive" is the oracle with its dense s x s bias.

    Returns:
        [batch, seq, heads, head_dim] in query's dtype.

    Raises:
        ValueError: shapes do not fit or the backend is unknown.
        TypeError: float32 on a GPU, for which there is no flash kernel.
    """
    kv_heads = key.shape[2]
    if key.shape != value.shape or query.shape[2] % kv_heads or query.shape[:2] != key.shape[:2]:
        raise ValueError(
            f"dmc_attention needs query [b, s, heads, d], key and value [b, s, kv_heads, d] with kv_heads dividing heads; "
            f"got query {tuple(query.shape)}, key {tuple(key.shape)}, value {tuple(value.shape)}"
        )
    if merge_logits.shape != key.shape[:3]:
        raise ValueError(
            f"merge_logits must be [b, s, kv_heads] = {tuple(key.shape[:3])}, got {tuple(merge_logits.shape)}"
        )
    scale = 1 / math.sqrt(query.shape[-1]) if softmax_scale is None else softmax_scale

    if backend == "naive":
        out, lse = naive.dmc_attention(query, key, value, merge_logits, scale, document_starts)
    elif backend in ("auto", "torch"):

        def attend(*tensors: Tensor) -> tuple[Tensor, Tensor]:
            return DiagonalAttention.apply(*tensors, scale, bias_channel)

        if document_starts is None or not bool(document_starts[:, 1:].any()):
            out, lse = attend(query, key, value, merge_logits)
        else:
            starts = document_starts.clone()
            starts[:, 0] = True
            # The ignored first logits must not leak out of the padding behind a document, where its first token stands in.
            merge_logits = merge_logits.masked_fill(starts[..., None], float("-inf"))
            out, lse = attend_documents(attend, starts, (query, key, value, merge_logits))
    else:
        raise ValueError(f"backend must be auto, torch or naive, got {backend!r}")
    return (out, lse) if return_lse else out
