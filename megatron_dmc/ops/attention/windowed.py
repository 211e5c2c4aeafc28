"""Attention to raw keys nearby and to slots farther off: two stock kernels, joined by their log-sum-exps.

NEAR is attention within the last ``local_window`` tokens. FAR is the problem without a window, between queries that many
tokens later and the keys that have left it by then. Each kernel's backward pass takes the final out and log-sum-exp.
"""

from collections.abc import Callable
from typing import Any, Literal

import torch
import torch.nn.functional as F
from torch import Tensor

from megatron_dmc.ops.attention.diagonal import diagonal_backward, diagonal_forward
from megatron_dmc.ops.attention.eviction import eviction_backward, eviction_forward
from megatron_dmc.ops.attention.sliding import sliding_backward, sliding_forward

FAR: dict[str, tuple[Callable[..., Any], Callable[..., Any]]] = {
    "merge": (diagonal_forward, diagonal_backward),
    "evict": (eviction_forward, eviction_backward),
}


def join(out: Tensor, lse: Tensor, other: Tensor, other_lse: Tensor) -> tuple[Tensor, Tensor]:
    """One softmax over the keys of both: outs [batch, seq, heads, head_dim], log-sum-exps [batch, seq, heads]."""
    weight = torch.sigmoid(other_lse - lse).to(out.dtype)[..., None]
    return torch.lerp(out, other, weight), torch.logaddexp(lse, other_lse)


class WindowedAttention(torch.autograd.Function):
    """``far_key`` and ``far_value`` are the slots of every token; evict does not read them."""

    @staticmethod
    def forward(
        ctx: Any,
        query: Tensor,
        key: Tensor,
        value: Tensor,
        far_key: Tensor,
        far_value: Tensor,
        merge_logits: Tensor,
        local_window: int,
        operation: Literal["merge", "evict"],
        softmax_scale: float,
        bias_channel: int | None,
    ) -> tuple[Tensor, Tensor]:
        if operation == "evict":
            far_key, far_value = key, value
        out, lse = sliding_forward(query, key, value, local_window, softmax_scale)
        far = query.shape[1] - local_window
        if far > 0:
            kept = (x[:, :far] for x in (far_key, far_value, merge_logits))
            other = FAR[operation][0](query[:, local_window:], *kept, softmax_scale, bias_channel)
            out[:, local_window:], lse[:, local_window:] = join(out[:, local_window:], lse[:, local_window:], *other)
        ctx.save_for_backward(query, key, value, far_key, far_value, merge_logits, out, lse)
        ctx.settings = local_window, operation, softmax_scale, bias_channel
        ctx.mark_non_differentiable(lse)
        return out, lse

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor | None, ...]:
        grad_out = grads[0]
        query, key, value, far_key, far_value, merge_logits, out, lse = ctx.saved_tensors
        local_window, operation, softmax_scale, bias_channel = ctx.settings
        far = query.shape[1] - local_window
        d_later_query: Tensor | None = None
        if far > 0:  # before the near part: of the two it needs more memory
            d_later_query, *d_far = FAR[operation][1](
                grad_out[:, local_window:],
                query[:, local_window:],
                *(x[:, :far] for x in (far_key, far_value, merge_logits)),
                out[:, local_window:],
                lse[:, local_window:],
                softmax_scale,
                bias_channel,
            )
            d_far = [F.pad(x, (0, 0) * (x.dim() - 2) + (0, local_window)) for x in d_far]
        else:
            d_far = [torch.zeros_like(x) for x in (far_key, far_value, merge_logits)]
        d_query, d_key, d_value = sliding_backward(grad_out, query, key, value, out, lse, local_window, softmax_scale)
        if d_later_query is not None:
            d_query[:, local_window:] += d_later_query
        if operation == "evict":
            d_far_key, d_far_value, d_logits = d_far
            d_far = [None, None, d_logits]
            d_key += d_far_key
            d_value += d_far_value
        return d_query, d_key, d_value, *d_far, None, None, None, None
