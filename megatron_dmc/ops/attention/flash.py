"""Stock flash-attention kernels of torch with an additive bias per key, forward and backward.

The kernels give no gradient of a bias. A channel of the query that is one (after scaling) sums the rows of dS into the
same channel of the key's gradient: that is the bias' gradient. The channel is one that the caller left free, or one that
is added for the occasion.
"""

import math
from collections.abc import Sequence
from typing import Any, NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor

from megatron_dmc.ops.attention.documents import Documents, by_documents

# exp(-1e4) is 0 in every dtype, and -1e4 itself is exact enough in bf16 and fp16. An infinite bias would empty row 0.
HIDDEN = -1e4

aten = torch.ops.aten


class Gradients(NamedTuple):
    query: Tensor
    key: Tensor
    value: Tensor
    key_bias: Tensor | None


def fading_bias(logits: Tensor) -> Tensor:
    """log(1 - sigmoid(logits)), which hides a key whose logit is infinite."""
    return F.logsigmoid(-logits).clamp(min=HIDDEN)


def flash_forward(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    key_bias: Tensor | None,
    *,
    causal: bool,
    softmax_scale: float,
    bias_channel: int | None = None,
    documents: Documents | None = None,
) -> tuple[Tensor, Tensor]:
    """softmax(scale q . k + key_bias) v on a stock flash kernel: no s x s tensor, K and V never expanded.

    Args:
        query: [batch, seq_q, heads, head_dim]; bf16 or fp16 on a GPU, any floating dtype on a CPU.
        key, value: [batch, seq_k, kv_heads, head_dim], kv_heads dividing heads.
        key_bias: [batch, seq_k, kv_heads], finite (HIDDEN hides a key), or None.
        causal: query i sees keys j <= i (seq_q == seq_k).
        bias_channel: a channel that is zero in query and key.
        documents: only with ``causal``: of tokens [1, tokens, ...], no document sees another.

    Returns:
        out [batch, seq_q, heads, head_dim] in query's dtype; log-sum-exp [batch, seq_q, heads], at least float32.
    """
    if query.is_cuda:
        return cuda_forward(query, key, value, key_bias, causal, softmax_scale, bias_channel, documents=documents)
    if documents is not None:

        def rows(
            _: Tensor, query: Tensor, key: Tensor, value: Tensor, key_bias: Tensor | None
        ) -> tuple[Tensor, Tensor]:
            return flash_forward(query, key, value, key_bias, causal=causal, softmax_scale=softmax_scale)

        out, lse = by_documents(documents, rows, query, key, value, key_bias)
        return out, lse
    out, lse = aten._scaled_dot_product_flash_attention_for_cpu(
        *_heads_first(query, key, value), 0.0, causal, attn_mask=_mask(query, key_bias), scale=softmax_scale
    )
    return out.transpose(1, 2), lse.transpose(1, 2)


def flash_backward(
    grad_out: Tensor,
    query: Tensor,
    key: Tensor,
    value: Tensor,
    out: Tensor,
    lse: Tensor,
    key_bias: Tensor | None,
    *,
    causal: bool,
    softmax_scale: float,
    bias_channel: int | None = None,
    documents: Documents | None = None,
) -> Gradients:
    """The kernel's gradients, given out and lse that may include terms which this kernel never saw.

    Only P_ij = exp(s_ij - lse_i) and rowsum(grad_out . out) enter, so with the final out and lse of a joined softmax the
    result is this part's exact share (as in ring attention, Liu et al., arXiv 2310.01889).
    """
    if query.is_cuda:
        return cuda_backward(
            grad_out, query, key, value, out, lse, key_bias, causal, softmax_scale, bias_channel, documents=documents
        )
    if documents is not None:

        def rows(inside: Tensor, *tensors: Any) -> Gradients:
            *states, key_bias = tensors
            return flash_backward(
                *unpadded(inside, *states),
                key_bias,
                causal=causal,
                softmax_scale=softmax_scale,
                bias_channel=bias_channel,
            )

        return Gradients(*by_documents(documents, rows, grad_out, query, key, value, out, lse, key_bias))
    head_dim = query.shape[-1]
    if key_bias is None:
        wide, channel = (grad_out, query, key, value, out), None
    elif bias_channel is not None:
        channel = bias_channel % head_dim
        wide = (grad_out, _with_channel(query, channel, 1 / softmax_scale), key, value, out)
    else:
        channel = head_dim
        padded_query = F.pad(query, (0, 1), value=1 / softmax_scale)
        wide = (F.pad(grad_out, (0, 1)), padded_query, F.pad(key, (0, 1)), F.pad(value, (0, 1)), F.pad(out, (0, 1)))
    grads = aten._scaled_dot_product_flash_attention_for_cpu_backward(
        *_heads_first(*wide),
        lse.transpose(1, 2).contiguous(),
        0.0,
        causal,
        attn_mask=_mask(query, key_bias),
        scale=softmax_scale,
    )
    return _split_bias([g.transpose(1, 2) for g in grads], channel, head_dim, 1.0)


def unpadded(
    inside: Tensor, grad_out: Tensor, query: Tensor, key: Tensor, value: Tensor, out: Tensor, lse: Tensor
) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor, Tensor]:
    """A backward pass's arguments, so that what is not ``inside`` [rows, seq] gets and gives no gradient."""
    grad_out = grad_out.masked_fill(~inside[..., None, None], 0)
    return grad_out, query, key, value, out, lse.masked_fill(~inside[..., None], float("inf"))


def _heads_first(*tensors: Tensor) -> list[Tensor]:
    return [x.transpose(1, 2) for x in tensors]


def _mask(query: Tensor, key_bias: Tensor | None) -> Tensor | None:
    """[batch, heads, 1, seq_k]: the CPU kernel broadcasts it over the queries, without memory if the keys lie together."""
    if key_bias is None:
        return None
    group = query.shape[2] // key_bias.shape[2]
    key_bias = key_bias.to(torch.promote_types(query.dtype, torch.float32))
    return key_bias.repeat_interleave(group, dim=2).transpose(1, 2)[:, :, None].contiguous()


def _with_channel(x: Tensor, channel: int, content: float | Tensor) -> Tensor:
    x = x.clone()
    x[..., channel] = content
    return x


def _split_bias(grads: Sequence[Tensor], channel: int | None, head_dim: int, factor: float) -> Gradients:
    """Takes the bias' gradient out of its channel. ``factor`` is scale times what the query holds there, inverted."""
    query, key, value = grads
    if channel is None:
        return Gradients(query, key, value, None)
    grad_bias = key[..., channel].float() * factor if key.dtype != torch.float64 else key[..., channel] * factor
    if channel < head_dim:
        query[..., channel] = 0
        key[..., channel] = 0
    return Gradients(query[..., :head_dim], key[..., :head_dim], value[..., :head_dim], grad_bias)


# The CUDA kernels take no bias at all: it travels in the channel, forward and backward.


def _carry_bias(
    query: Tensor, key: Tensor, key_bias: Tensor, softmax_scale: float, bias_channel: int | None
) -> tuple[Tensor, Tensor, int, float]:
    """query and key with p and bias / (scale p) in a channel; p is a power of two near 1 / scale, so exact in bf16."""
    carrier = 2.0 ** round(-math.log2(softmax_scale))
    content = key_bias / (softmax_scale * carrier)
    if bias_channel is None:
        # Flash kernels want multiples of 8. Two channels carry the bias with twice the digits.
        high = content.to(key.dtype)
        low = (content - high.float()).to(key.dtype)
        carriers = torch.full((*query.shape[:-1], 2), carrier, dtype=query.dtype, device=query.device)
        query = torch.cat([query, F.pad(carriers, (0, 6))], dim=-1)
        key = torch.cat([key, F.pad(torch.stack([high, low], dim=-1), (0, 6))], dim=-1)
        return query, key, query.shape[-1] - 8, carrier
    channel = bias_channel % query.shape[-1]
    return _with_channel(query, channel, carrier), _with_channel(key, channel, content.to(key.dtype)), channel, carrier


def _window_sizes(window: int | None) -> dict[str, int]:
    return {} if window is None else {"window_size_left": window - 1, "window_size_right": 0}


def _check_cuda(query: Tensor) -> None:
    if query.dtype not in (torch.bfloat16, torch.float16):
        raise TypeError(
            f"attention on a GPU needs bfloat16 or float16, got {query.dtype}: load the model with dtype=torch.bfloat16 (in a "
            "recipe: training.bf16 true)"
        )


def cuda_forward(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    key_bias: Tensor | None,
    causal: bool,
    softmax_scale: float,
    bias_channel: int | None,
    window: int | None = None,
    documents: Documents | None = None,
) -> tuple[Tensor, Tensor]:
    """As flash_forward; with a window, query i sees keys i - window < j <= i."""
    _check_cuda(query)
    head_dim = query.shape[-1]
    if key_bias is not None:
        query, key, _, _ = _carry_bias(query, key, key_bias, softmax_scale, bias_channel)
        value = F.pad(value, (0, query.shape[-1] - head_dim))
    tensors, places = _places(documents, query, key, value)
    out, lse, *_ = aten._flash_attention_forward(
        *tensors,
        *places,
        0.0,
        causal,
        False,
        scale=softmax_scale,
        **_window_sizes(window),
    )
    if documents is not None:
        out, lse = out[None], lse[None]
    return out[..., :head_dim], lse.transpose(1, 2)


def cuda_backward(
    grad_out: Tensor,
    query: Tensor,
    key: Tensor,
    value: Tensor,
    out: Tensor,
    lse: Tensor,
    key_bias: Tensor | None,
    causal: bool,
    softmax_scale: float,
    bias_channel: int | None,
    window: int | None = None,
    documents: Documents | None = None,
) -> Gradients:
    """As flash_backward, with cuda_forward's window."""
    _check_cuda(query)
    head_dim = query.shape[-1]
    channel, carrier = None, 1.0
    if key_bias is not None:
        query, key, channel, carrier = _carry_bias(query, key, key_bias, softmax_scale, bias_channel)
        extra = (0, query.shape[-1] - head_dim)
        value, grad_out, out = F.pad(value, extra), F.pad(grad_out, extra), F.pad(out, extra)
    no_dropout = torch.zeros((), dtype=torch.uint64, device=query.device)
    lse = lse.transpose(1, 2)  # [batch, heads, seq], or [heads, tokens]
    tensors, places = _places(documents, grad_out.contiguous(), query, key, value, out.contiguous(), lse.contiguous())
    grads = aten._flash_attention_backward(
        *tensors,
        *places,
        0.0,
        causal,
        no_dropout,
        no_dropout,
        scale=softmax_scale,
        **_window_sizes(window),
    )
    if documents is not None:
        grads = [x[None] for x in grads]
    return _split_bias(grads, channel, head_dim, 1 / (softmax_scale * carrier))


def _places(documents: Documents | None, *tensors: Tensor) -> tuple[list[Tensor], list[Any]]:
    """The kernel's tensors, and its (cum_seq_q, cum_seq_k, max_q, max_k)."""
    if documents is None:
        query, key = tensors[:2] if len(tensors) == 3 else tensors[1:3]
        return list(tensors), [None, None, query.shape[1], key.shape[1]]
    ends, longest = documents.cu_seqlens, documents.longest
    return [x[0] for x in tensors], [ends, ends, longest, longest]
