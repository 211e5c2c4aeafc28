"""Attention to raw keys nearby and to slots farther off: stock kernels, joined by their log-sum-exps.

NEAR is attention within the last ``local_window`` tokens. FAR is the problem without a window, between queries that many
tokens later and the keys that have left it by then. Queries in the middle of a sequence (a context-parallel rank's chunk) see
the far keys in two parts: those before the chunk's own, which every query sees, and its own, a causal problem. Each kernel's
backward pass takes the final out and log-sum-exp.
"""

from collections.abc import Callable
from typing import Any, Literal, NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor

from megatron_dmc.ops.attention.diagonal import FarGradients, diagonal_backward, diagonal_forward
from megatron_dmc.ops.attention.documents import Documents
from megatron_dmc.ops.attention.faded import faded_backward, faded_forward
from megatron_dmc.ops.attention.sliding import sliding_backward, sliding_forward

# query, key, value, far_key, far_value, merge_logits; what a form does not read is None.
States = tuple[Tensor, Tensor | None, Tensor | None, Tensor | None, Tensor | None, Tensor | None]


class Form(NamedTuple):
    """What is computed. ``operation`` None: plain causal attention to keys that never fade."""

    local_window: int
    operation: Literal["merge", "evict"] | None
    softmax_scale: float
    bias_channel: int | None
    documents: Documents | None = None  # of tokens [1, tokens, ...]; only for whole sequences


class Keys(NamedTuple):
    """A whole sequence's keys.

    Attributes:
        key, value: raw, [batch, seq, kv_heads, head_dim]; None: there is no window.
        far_key, far_value: what is left of tokens outside the window: slots, or with ``evict`` the raw ones.
        fading: [batch, seq, kv_heads], the logit of what a far key loses to all queries but its own slot's; None: nothing.
    """

    key: Tensor | None
    value: Tensor | None
    far_key: Tensor
    far_value: Tensor
    fading: Tensor | None


def gather_keys(
    key: Tensor | None,
    value: Tensor | None,
    far_key: Tensor | None,
    far_value: Tensor | None,
    merge_logits: Tensor | None,
    form: Form,
) -> Keys:
    """The keys from attention's arguments. Without slots the raw keys are the far ones too."""
    if far_key is None or far_value is None:
        assert key is not None and value is not None
        far_key, far_value = key, value
    if form.local_window == 0:
        key = value = None
    fading = None
    if merge_logits is not None:
        logits = merge_logits.to(torch.promote_types(far_key.dtype, torch.float32))
        if form.operation == "merge":  # into the slot of the token before; nothing comes after the last
            fading = F.pad(logits[:, 1:], (0, 0, 0, 1), value=float("-inf"))
        else:  # the first token is never thrown away
            fading = F.pad(logits[:, 1:], (0, 0, 1, 0), value=float("-inf"))
    return Keys(key, value, far_key, far_value, fading)


class _Sum:
    """Adds up gradients of parts of a sequence. The first part is taken as it is if it is the whole."""

    def __init__(self, like: Tensor, dtype: torch.dtype | None) -> None:
        self.like, self.dtype = like, dtype or like.dtype
        self.total: Tensor | None = None

    def add(self, part: Tensor, at: slice | Tensor) -> None:
        """``at``: which of the sequence's tokens, none of them twice."""
        if self.total is None and part.shape == self.like.shape and part.dtype == self.dtype:
            self.total = part
            return
        if self.total is None:
            self.total = torch.zeros_like(self.like, dtype=self.dtype, memory_format=torch.contiguous_format)
        self.total[:, at] += part

    def result(self) -> Tensor:
        if self.total is None:
            self.total = torch.zeros_like(self.like, dtype=self.dtype, memory_format=torch.contiguous_format)
        return self.total


class KeySums:
    """Gradients of ``keys``, over all parts that see them; ``dtype`` None: the keys' own."""

    def __init__(self, keys: Keys, form: Form, dtype: torch.dtype | None = None) -> None:
        self.operation = form.operation
        self.far_key, self.far_value = _Sum(keys.far_key, dtype), _Sum(keys.far_value, dtype)
        self.key, self.value = self.far_key, self.far_value
        # Evicted keys are the raw ones: they have one gradient.
        if keys.key is not None and keys.value is not None and form.operation == "merge":
            self.key, self.value = _Sum(keys.key, dtype), _Sum(keys.value, dtype)
        self.fading = None if keys.fading is None else _Sum(keys.fading, None)

    def add_far(self, gradients: FarGradients, at: slice | Tensor) -> None:
        self.far_key.add(gradients.key, at)
        self.far_value.add(gradients.value, at)
        if self.fading is not None and gradients.fading is not None:
            self.fading.add(gradients.fading, at)

    def add_rows(self, others: "KeySums", at: slice) -> None:
        """Gradients of all rows' tokens ``at`` that stand one after another, [1, batch * tokens, ...]."""
        pairs = {id(own): (own, other) for own, other in zip(self._all(), others._all(), strict=True)}
        for own, other in pairs.values():
            own.add(other.result().view(own.like.shape[0], -1, *own.like.shape[2:]), at)

    def _all(self) -> list[_Sum]:
        sums = [self.far_key, self.far_value, self.key, self.value]
        return sums if self.fading is None else [*sums, self.fading]

    def gradients(
        self, key: Tensor | None, far_key: Tensor | None, merge_logits: Tensor | None
    ) -> tuple[Tensor | None, ...]:
        """Of gather_keys' arguments key, value, far_key, far_value and merge_logits, each if it was given."""
        d_logits = None
        if merge_logits is not None and self.fading is not None:
            # The adjoint of gather_keys' padding; the first token's logit is never read.
            kept = slice(None, -1) if self.operation == "merge" else slice(1, None)
            d_logits = F.pad(self.fading.result()[:, kept], (0, 0, 1, 0)).to(merge_logits.dtype)
        return (
            *((None, None) if key is None else (self.key.result(), self.value.result())),
            *((None, None) if far_key is None else (self.far_key.result(), self.far_value.result())),
            d_logits,
        )


class _Parts:
    """Which keys consecutive queries see, the first of them token ``begin``.

    Attributes:
        near: the tokens that their windows reach, ``front`` of them before the first query.
        before: far keys that all queries from ``later`` on see.
        own: those that stand a window before the queries ``later``: a causal problem; ``documents`` are theirs.
    """

    own: slice | Tensor
    later: slice | Tensor

    def __init__(self, begin: int, queries: int, form: Form) -> None:
        window, end = form.local_window, begin + queries
        self.near = slice(max(begin - window + 1, 0), end)
        self.front = begin - self.near.start
        far = max(begin - window, 0)
        self.before = slice(0, far)
        self.own, self.later = slice(far, end - window), slice(far + window - begin, queries)
        self.empty = end - window <= far
        self.documents = form.documents
        if form.documents is not None and window:
            self.documents, later = form.documents.later(window)
            self.later, self.own = later, later - window
            self.empty = len(later) == 0


def attend(query: Tensor, keys: Keys, begin: int, form: Form) -> tuple[Tensor, Tensor]:
    """Attention of consecutive queries, the first of them token ``begin`` of the sequence, to the keys up to their own.

    Args:
        query: [batch, queries, heads, head_dim].

    Returns:
        out [batch, queries, heads, head_dim], log-sum-exp [batch, queries, heads].
    """
    window, operation, scale, channel, documents = form
    parts = _Parts(begin, query.shape[1], form)
    near = None
    if window:
        assert keys.key is not None and keys.value is not None
        # Queries of no meaning stand before the first, so that the kernel sees a problem from a sequence's start.
        padded = F.pad(query, (0, 0, 0, 0, parts.front, 0)) if parts.front else query
        near = sliding_forward(padded, keys.key[:, parts.near], keys.value[:, parts.near], window, scale, documents)
        near = near[0][:, parts.front :], near[1][:, parts.front :]
        if parts.empty:
            return near
    forward: Callable[..., tuple[Tensor, Tensor]] = diagonal_forward if operation == "merge" else faded_forward
    later = query[:, parts.later]
    far = forward(later, *_far(keys, parts.own), scale, channel, parts.documents)
    if parts.before.stop:
        before = faded_forward(later, *_far(keys, parts.before), scale, channel, causal=False)
        far = join(*far, *before)
    if near is None:
        return far
    out, lse = near
    out[:, parts.later], lse[:, parts.later] = join(out[:, parts.later], lse[:, parts.later], *far)
    return out, lse


def attend_backward(
    grad_out: Tensor, query: Tensor, keys: Keys, begin: int, out: Tensor, lse: Tensor, form: Form, sums: KeySums
) -> Tensor:
    """The query's gradient; the keys' are added to ``sums``. ``out`` and ``lse`` are what attend returned."""
    window, operation, scale, channel, documents = form
    parts = _Parts(begin, query.shape[1], form)
    d_later: Tensor | None = None
    if not parts.empty:  # before the near part: of the two it needs more memory
        grad, later, far_out, far_lse = (x[:, parts.later] for x in (grad_out, query, out, lse))
        backward: Callable[..., Any] = diagonal_backward if operation == "merge" else faded_backward
        own = _far(keys, parts.own)
        gradients = backward(grad, later, *own, far_out, far_lse, scale, channel, parts.documents)
        d_later = gradients.query
        sums.add_far(gradients, parts.own)
        if parts.before.stop:
            before = _far(keys, parts.before)
            gradients = faded_backward(grad, later, *before, far_out, far_lse, scale, channel, causal=False)
            d_later = d_later + gradients.query
            sums.add_far(gradients, parts.before)
        del gradients  # added up; the near part needs the room
        if not window:
            return d_later
    assert keys.key is not None and keys.value is not None
    front = parts.front
    tensors = [grad_out, query, out, lse]
    if front:
        tensors = [F.pad(x, (0, 0) * (x.dim() - 2) + (front, 0)) for x in tensors]
    grad, padded, near_out, near_lse = tensors
    near = keys.key[:, parts.near], keys.value[:, parts.near]
    d_query, d_key, d_value = sliding_backward(grad, padded, *near, near_out, near_lse, window, scale, documents)
    sums.key.add(d_key, parts.near)
    sums.value.add(d_value, parts.near)
    d_query = d_query[:, front:]
    if d_later is not None:
        d_query[:, parts.later] += d_later
    return d_query


def attend_whole(states: States, form: Form) -> Tensor:
    """SlotAttention of [batch, seq, ...]; documents lie among the tokens of all rows."""
    if form.documents is None:
        return SlotAttention.apply(*states, form)[0]
    flat = [None if x is None else x.flatten(0, 1)[None] for x in states]
    if flat[-1] is not None:
        # What a document's first token says leaks into the text before it through the key bias.
        flat[-1] = flat[-1].masked_fill(form.documents.starts[None, :, None], float("-inf"))
    return SlotAttention.apply(*flat, form)[0].view(states[0].shape)


class SlotAttention(torch.autograd.Function):
    """Over whole sequences. Tensors that the form does not read are None: raw keys without a window, slots with ``evict``."""

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
    ) -> tuple[Tensor, Tensor]:
        out, lse = attend(query, gather_keys(key, value, far_key, far_value, merge_logits, form), 0, form)
        ctx.save_for_backward(query, key, value, far_key, far_value, merge_logits, out, lse)
        ctx.form = form
        ctx.mark_non_differentiable(lse)
        return out, lse

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor | None, ...]:
        query, key, value, far_key, far_value, merge_logits, out, lse = ctx.saved_tensors
        keys = gather_keys(key, value, far_key, far_value, merge_logits, ctx.form)
        sums = KeySums(keys, ctx.form)
        d_query = attend_backward(grads[0], query, keys, 0, out, lse, ctx.form, sums)
        return d_query, *sums.gradients(key, far_key, merge_logits), None


def join(out: Tensor, lse: Tensor, other: Tensor, other_lse: Tensor) -> tuple[Tensor, Tensor]:
    """One softmax over the keys of both: outs [batch, seq, heads, head_dim], log-sum-exps [batch, seq, heads]."""
    weight = torch.sigmoid(other_lse - lse).to(out.dtype)[..., None]
    return torch.lerp(out, other, weight), torch.logaddexp(lse, other_lse)


def _far(keys: Keys, part: slice | Tensor) -> tuple[Tensor, Tensor, Tensor | None]:
    fading = None if keys.fading is None else keys.fading[:, part]
    return keys.far_key[:, part], keys.far_value[:, part], fading
