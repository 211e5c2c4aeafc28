"""Attention to raw keys in the local window and to slots outside it: calls of stock kernels, joined by their log-sum-exps.

NEAR is attention to the last ``local_window`` tokens. Far keys are those that left the window. Consecutive queries in the
middle of a sequence (a context-parallel rank's chunk) see them in two parts: the far keys BEFORE, which every query sees, and
their OWN, which leave the window one with each query: a causal problem. README.md has the picture. Each kernel's backward pass
takes the final out and log-sum-exp.
"""

from dataclasses import replace
from typing import Any, NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor

from megatron_dmc.ops.attention.diagonal import diagonal_backward, diagonal_forward
from megatron_dmc.ops.attention.fading_keys import fading_backward, fading_forward
from megatron_dmc.ops.attention.flash import flash_backward, flash_forward
from megatron_dmc.ops.attention.keys import KeyGradients, Keys, keys_of
from megatron_dmc.ops.attention.one_key import add_one_key_gradients, join_one_key
from megatron_dmc.ops.attention.parts import Parts
from megatron_dmc.ops.attention.types import Attended, Form, States, join


class Queries(NamedTuple):
    """Consecutive queries [batch, queries, heads, head_dim], the first of which is token ``begin`` of the sequence."""

    query: Tensor
    begin: int


def attend(queries: Queries, keys: Keys, form: Form) -> Attended:
    """Attention of the queries to the keys up to their own."""
    query = queries.query
    parts = Parts(queries.begin, query.shape[1], form)
    near = None
    if form.local_window:
        # Queries without meaning come before the first, so that the kernel sees a problem from a sequence's start.
        padded = F.pad(query, (0, 0, 0, 0, parts.front, 0)) if parts.front else query
        out, lse = flash_forward(padded, keys.near(parts.near), replace(form.kernel, window=form.local_window))
        near = Attended(out[:, parts.front :], lse[:, parts.front :])
        if parts.empty:
            return near
    forward = diagonal_forward if form.operation == "merge" else fading_forward
    later = query[:, parts.later]
    far = forward(later, keys.far(parts.own), replace(form.kernel, documents=parts.documents))
    if form.operation == "absorb":
        far = join_one_key(later, far, keys.residual(parts.own), form.kernel.softmax_scale)
    if parts.before.stop:
        far = join(far, fading_forward(later, keys.far(parts.before), replace(form.kernel, causal=False)))
    if near is None:
        return far
    near.out[:, parts.later], near.lse[:, parts.later] = join(
        Attended(near.out[:, parts.later], near.lse[:, parts.later]), far
    )
    return near


def attend_backward(
    grad_out: Tensor, queries: Queries, keys: Keys, final: Attended, form: Form, sums: KeyGradients
) -> Tensor:
    """The query's gradient; the keys' are added to ``sums``. ``final`` is what attend returned."""
    query = queries.query
    parts = Parts(queries.begin, query.shape[1], form)
    d_later: Tensor | None = None
    if not parts.empty:  # before the near part, because it needs more memory
        backward = diagonal_backward if form.operation == "merge" else fading_backward
        grad, later, *of_later = (x[:, parts.later] for x in (grad_out, query, *final))
        settings = replace(form.kernel, documents=parts.documents)
        gradients = backward(grad, later, keys.far(parts.own), Attended(*of_later), settings)
        d_later = gradients.query
        sums.add_far(gradients, parts.own)
        if form.operation == "absorb":
            one, sum_of_one = keys.residual(parts.own), sums.residual(parts.own)
            into, scale = (d_later, sum_of_one.key, sum_of_one.value), form.kernel.softmax_scale
            d_log_mass = add_one_key_gradients(into, grad, later, one, Attended(*of_later), scale)
            sums.add_residual(sum_of_one._replace(log_weight=d_log_mass), parts.own)
            del into, sum_of_one
        if parts.before.stop:
            settings = replace(form.kernel, causal=False)
            gradients = fading_backward(grad, later, keys.far(parts.before), Attended(*of_later), settings)
            d_later = d_later + gradients.query
            sums.add_far(gradients, parts.before)
        del gradients  # added up; the near part needs the memory
        if not form.local_window:
            return d_later
    tensors = [grad_out, query, *final]
    if parts.front:
        tensors = [F.pad(x, (0, 0) * (x.dim() - 2) + (parts.front, 0)) for x in tensors]
    grad, padded, *of_padded = tensors
    settings = replace(form.kernel, window=form.local_window)
    near = flash_backward(grad, padded, keys.near(parts.near), Attended(*of_padded), settings)
    sums.add_near(near.key, near.value, parts.near)
    d_query = near.query[:, parts.front :]
    if d_later is not None:
        d_query[:, parts.later] += d_later
    return d_query


def attend_whole(states: States, form: Form) -> Tensor:
    """Slot attention of whole sequences, [batch, seq, ...]; the form's documents lie among the tokens of all rows."""
    documents = form.kernel.documents
    if documents is None:
        return SlotAttention.apply(*states, form)[0]
    flat = States._make(None if x is None else x.flatten(0, 1)[None] for x in states)
    if flat.merge_logits is not None:
        # The logit of a document's first token would fade the last key of the document before it.
        merge_logits = flat.merge_logits.masked_fill(documents.starts[None, :, None], float("-inf"))
        flat = flat._replace(merge_logits=merge_logits)
    return SlotAttention.apply(*flat, form)[0].view(states.query.shape)


class SlotAttention(torch.autograd.Function):
    """Slot attention of whole sequences. Its arguments are States, one by one, as autograd requires."""

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
    ) -> tuple[Tensor, Tensor]:
        states = States(query, key, value, far_key, far_value, merge_logits, omega)
        out, lse = attend(Queries(query, 0), keys_of(states, form), form)
        ctx.save_for_backward(*states, out, lse)
        ctx.form = form
        ctx.mark_non_differentiable(lse)
        return out, lse

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor | None, ...]:
        *tensors, out, lse = ctx.saved_tensors
        states, form = States(*tensors), ctx.form
        keys = keys_of(states, form)
        sums = KeyGradients(keys, form)
        d_query = attend_backward(grads[0], Queries(states.query, 0), keys, Attended(out, lse), form, sums)
        return d_query, *sums.of(states), None
