"""Attention of a sequence that is cut over a context-parallel group."""

import math
from typing import Any, Literal, cast

import torch
import torch.distributed as dist
from torch import Tensor

from megatron_dmc.ops.attention.documents import Documents
from megatron_dmc.ops.attention.packed_chunk import attend_packed, attend_packed_backward
from megatron_dmc.ops.attention.windowed import (
    Form,
    Keys,
    KeySums,
    States,
    attend,
    attend_backward,
    attend_whole,
    gather_keys,
)
from megatron_dmc.ops.context_parallel import (
    chunk_numbers,
    gather_sequence,
    sum_to_local,
    swap_to_heads,
    swap_to_sequence,
)

Exchange = Literal["all_gather", "a2a"]


def context_parallel_attention(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    pooled_key: Tensor | None = None,
    pooled_value: Tensor | None = None,
    merge_logits: Tensor | None = None,
    *,
    group: dist.ProcessGroup,
    exchange: Exchange,
    local_window: int = 0,
    operation: Literal["merge", "evict"] = "merge",
    softmax_scale: float | None = None,
    bias_channel: int | None = None,
    documents: Documents | None = None,
) -> Tensor:
    """As ``windowed_dmc_attention``, on this rank's two chunks of a sequence (see ops/context_parallel.py).

    ``all_gather``: every rank gets all keys and values of the layer and runs its own queries. What is kept for the backward
    pass is this rank's share, 1 / ranks of the sequence; the gathered keys and values (and in the backward pass their
    gradients, in float32) are as long as the sequence and live while a layer runs. ``a2a``: every rank gets the whole sequence
    for 1 / ranks of the heads and runs them as one process would; everything is 1 / ranks of the whole.

    Args:
        query, key, value, pooled_key, pooled_value, merge_logits: as windowed_dmc_attention's, with seq / ranks tokens.
            Without merge logits plain causal attention of query, key and value.
        group: the ranks that share the sequence.
        exchange: ``a2a`` needs KV heads that the number of ranks divides.
        documents: of the whole sequences.

    Returns:
        [batch, seq / ranks, heads, head_dim] in query's dtype; differentiable in all six tensors.
    """
    scale = 1 / math.sqrt(query.shape[-1]) if softmax_scale is None else softmax_scale
    states: States
    if merge_logits is None:
        states, form = (query, key, value, None, None, None), Form(0, None, scale, None)
    else:
        near = (None, None) if local_window == 0 and operation == "merge" else (key, value)
        far = (None, None) if operation == "evict" else (pooled_key, pooled_value)
        states = query, *near, *far, merge_logits
        form = Form(local_window, operation, scale, bias_channel)
    if exchange == "all_gather":
        return _GatheredAttention.apply(*states, form, documents, group)[0]
    ranks = dist.get_world_size(group)
    if key.shape[2] % ranks:
        raise ValueError(f"a2a needs KV heads that the {ranks} ranks divide, got {key.shape[2]}; use all_gather")
    swapped = cast(States, tuple(None if x is None else swap_to_heads(x, group) for x in states))
    return swap_to_sequence(attend_whole(swapped, form._replace(documents=documents)), group)


class _GatheredAttention(torch.autograd.Function):
    """SlotAttention's arguments of this rank; keys are gathered once for each pass, so that none are kept between the two."""

    @staticmethod
    def forward(
        ctx: Any,
        query: Tensor,
        key: Tensor | None,
        value: Tensor | None,
        far_key: Tensor | None,
        far_value: Tensor | None,
        merge_logits: Tensor | None,
        form: Form,
        documents: Documents | None,
        group: dist.ProcessGroup,
    ) -> tuple[Tensor, Tensor]:
        keys = _gathered(key, value, far_key, far_value, merge_logits, form, documents, group)
        chunk = query.shape[1] // 2
        parts = [
            attend(part, keys, number * chunk, form)
            if documents is None
            else attend_packed(part, keys, number * chunk, form, documents)
            for number, part in zip(chunk_numbers(group), query.split(chunk, dim=1), strict=True)
        ]
        out, lse = (torch.cat(part, dim=1) for part in zip(*parts, strict=True))
        ctx.save_for_backward(query, key, value, far_key, far_value, merge_logits, out, lse)
        ctx.settings = form, documents, group
        ctx.mark_non_differentiable(lse)
        return out, lse

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor | None, ...]:
        query, key, value, far_key, far_value, merge_logits, out, lse = ctx.saved_tensors
        form, documents, group = ctx.settings
        keys = _gathered(key, value, far_key, far_value, merge_logits, form, documents, group)
        sums = KeySums(keys, form, torch.promote_types(query.dtype, torch.float32))
        chunk = query.shape[1] // 2
        d_query = []
        for number, begin in zip(chunk_numbers(group), (0, chunk), strict=True):
            grad, part, part_out, part_lse = (x[:, begin : begin + chunk] for x in (grads[0], query, out, lse))
            states = grad, part, keys, number * chunk, part_out, part_lse, form
            if documents is None:
                d_query.append(attend_backward(*states, sums))
            else:
                d_query.append(attend_packed_backward(*states, documents, sums))
        d_keys = [
            None if d is None or x is None else sum_to_local(d, group).to(x.dtype)
            for d, x in zip(
                sums.gradients(key, far_key, merge_logits),
                (key, value, far_key, far_value, merge_logits),
                strict=True,
            )
        ]
        return torch.cat(d_query, dim=1), *d_keys, None, None, None


def _gathered(
    key: Tensor | None,
    value: Tensor | None,
    far_key: Tensor | None,
    far_value: Tensor | None,
    merge_logits: Tensor | None,
    form: Form,
    documents: Documents | None,
    group: dist.ProcessGroup,
) -> Keys:
    """The whole sequence's keys. All of one dtype travel in one message."""
    local = [x for x in (key, value, far_key, far_value) if x is not None]
    parts = iter(gather_sequence(torch.cat(local, dim=-1), group).split(local[0].shape[-1], dim=-1))
    k, v, far_k, far_v = (None if x is None else next(parts) for x in (key, value, far_key, far_value))
    logits = None if merge_logits is None else gather_sequence(merge_logits, group)
    if logits is not None and documents is not None:
        logits = logits.masked_fill(documents.starts.view(*logits.shape[:2], 1), float("-inf"))
    return gather_keys(k, v, far_k, far_v, logits, form)
