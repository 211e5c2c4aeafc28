"""Attention of a sequence that is cut over a context-parallel group."""

import math
from dataclasses import replace
from typing import Any, Literal

import torch
import torch.distributed as dist
from torch import Tensor

from megatron_dmc.ops.attention.context_parallel_documents import attend_packed, attend_packed_backward
from megatron_dmc.ops.attention.documents import Documents
from megatron_dmc.ops.attention.keys import KeyGradients, keys_of
from megatron_dmc.ops.attention.slot_attention import Queries, attend, attend_backward, attend_whole
from megatron_dmc.ops.attention.types import Attended, Form, KernelSettings, Operation, States, check_operation
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
    operation: Operation = "merge",
    omega: Tensor | None = None,
    softmax_scale: float | None = None,
    bias_channel: int | None = None,
    documents: Documents | None = None,
) -> Tensor:
    """As ``windowed_dmc_attention``, on this rank's two chunks of a sequence (see ops/context_parallel.py).

    ``all_gather``: every rank gathers all keys and values of the layer and runs its own queries. For the backward pass it
    keeps its share, 1 / ranks of the sequence. The gathered keys and values, and in the backward pass their gradients in
    float32, are as long as the sequence and live while a layer runs. ``a2a``: every rank gets the whole sequence for
    1 / ranks of the heads and runs them as one process would. Every tensor is 1 / ranks of the whole.

    Args:
        query, key, value, pooled_key, pooled_value, merge_logits, omega: as windowed_dmc_attention's, with seq / ranks
            tokens. Without merge_logits it is plain causal attention of query, key and value.
        group: the ranks that share the sequence.
        exchange: how keys travel.
        documents: of the whole sequences.

    Returns:
        [batch, seq / ranks, heads, head_dim] in query's dtype; differentiable in all tensors.

    Raises:
        ValueError: as windowed_dmc_attention; ``a2a`` with a number of KV heads that the number of ranks does not divide.
    """
    scale = 1 / math.sqrt(query.shape[-1]) if softmax_scale is None else softmax_scale
    kernel = KernelSettings(scale, documents=documents)
    if merge_logits is None:
        states, form = States(query, key, value, None, None, None), Form(0, None, kernel)
    else:
        check_operation(operation, local_window, omega)
        states = States(query, key, value, pooled_key, pooled_value, merge_logits, omega)
        if operation != "merge":
            states = states._replace(far_key=None, far_value=None)
        elif local_window == 0:
            states = states._replace(key=None, value=None)
        form = Form(local_window, operation, replace(kernel, bias_channel=bias_channel))
    if exchange == "all_gather":
        return _GatheredAttention.apply(*states, form, group)[0]
    ranks = dist.get_world_size(group)
    if key.shape[2] % ranks:
        raise ValueError(f"a2a needs KV heads that the {ranks} ranks divide, got {key.shape[2]}; use all_gather")
    swapped = States._make(None if x is None else swap_to_heads(x, group) for x in states)
    return swap_to_sequence(attend_whole(swapped, form), group)


class _GatheredAttention(torch.autograd.Function):
    """Attention of this rank's States, one by one. Keys are gathered in each pass, so that none are kept between the two."""

    @staticmethod
    def forward(
        ctx: Any,
        query: Tensor,
        key: Tensor | None,
        value: Tensor | None,
        far_key: Tensor | None,
        far_value: Tensor | None,
        merge_logits: Tensor | None,
        omega: Tensor | None,
        form: Form,
        group: dist.ProcessGroup,
    ) -> tuple[Tensor, Tensor]:
        states = States(query, key, value, far_key, far_value, merge_logits, omega)
        keys = keys_of(_gathered(states, form, group), form)
        forward = attend if form.kernel.documents is None else attend_packed
        chunk = query.shape[1] // 2
        parts = [
            forward(Queries(part, number * chunk), keys, form)
            for number, part in zip(chunk_numbers(group), query.split(chunk, dim=1), strict=True)
        ]
        out, lse = (torch.cat(part, dim=1) for part in zip(*parts, strict=True))
        ctx.save_for_backward(*states, out, lse)
        ctx.settings = form, group
        ctx.mark_non_differentiable(lse)
        return out, lse

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor | None, ...]:
        *tensors, out, lse = ctx.saved_tensors
        states = States(*tensors)
        form, group = ctx.settings
        whole = _gathered(states, form, group)
        keys = keys_of(whole, form)
        sums = KeyGradients(keys, form, torch.promote_types(states.query.dtype, torch.float32))
        backward = attend_backward if form.kernel.documents is None else attend_packed_backward
        chunk = states.query.shape[1] // 2
        d_query = []
        for number, begin in zip(chunk_numbers(group), (0, chunk), strict=True):
            grad, part, *final = (x[:, begin : begin + chunk] for x in (grads[0], states.query, out, lse))
            d_query.append(backward(grad, Queries(part, number * chunk), keys, Attended(*final), form, sums))
        d_keys = [
            None if d is None or x is None else sum_to_local(d, group).to(x.dtype)
            for d, x in zip(sums.of(whole), states[1:], strict=True)
        ]
        return torch.cat(d_query, dim=1), *d_keys, None, None


def _gathered(states: States, form: Form, group: dist.ProcessGroup) -> States:
    """The whole sequence's states, but the query. All of one dtype travel in one message."""
    local = [x for x in states[1:5] if x is not None]
    parts = iter(gather_sequence(torch.cat(local, dim=-1), group).split(local[0].shape[-1], dim=-1))
    key, value, far_key, far_value = (None if x is None else next(parts) for x in states[1:5])
    merge_logits, omega = states.merge_logits, states.omega
    if merge_logits is not None and omega is not None:
        merge_logits, omega = gather_sequence(torch.stack([merge_logits, omega], dim=-1), group).unbind(-1)
    elif merge_logits is not None:
        merge_logits = gather_sequence(merge_logits, group)
    documents = form.kernel.documents
    if merge_logits is not None and documents is not None:
        merge_logits = merge_logits.masked_fill(documents.starts.view(*merge_logits.shape[:2], 1), float("-inf"))
    return States(states.query, key, value, far_key, far_value, merge_logits, omega)
