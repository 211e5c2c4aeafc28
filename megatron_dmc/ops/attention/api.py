"""The attention functions: arguments are checked and brought into one form, then an implementation runs."""

import math
from dataclasses import replace

from torch import Tensor

from megatron_dmc.ops.attention import naive
from megatron_dmc.ops.attention.documents import Documents
from megatron_dmc.ops.attention.slot_attention import attend_whole
from megatron_dmc.ops.attention.types import Form, KernelSettings, Operation, States, check_operation
from megatron_dmc.ops.backend import choose


def dmc_attention(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    merge_logits: Tensor,
    *,
    softmax_scale: float | None = None,
    bias_channel: int | None = None,
    document_starts: Tensor | Documents | None = None,
    backend: str = "auto",
) -> Tensor:
    """Query i sees slot state j <= i with score q_i . k~_j / sqrt(d) + [j < i] log(1 - alpha_{j+1}).

    A state into which the next token is merged fades from every later query, never from its own. With binary alpha a query
    sees what a decoder's compressed cache holds. Runs on a stock flash kernel and is differentiable in all four tensors. No
    tensor grows with s x s, and K and V are never expanded to the query heads.

    Args:
        query: [batch, seq, heads, head_dim], rotated. On a GPU bfloat16 or float16.
        key, value: [batch, seq, kv_heads, head_dim], pooled, the key rotated; kv_heads divides heads.
        merge_logits: [batch, seq, kv_heads], alpha = sigmoid(merge_logits); ±inf for binary decisions;
            merge_logits[:, 0] is ignored. Keep them in float32.
        softmax_scale: 1 / sqrt(head_dim) by default.
        bias_channel: a channel that is zero in query and key and may carry the bias (the ``neuron`` source). Its gradient
            is zero. None: every channel counts.
        document_starts: bool [batch, seq], true at the first token of a document; no document sees another. Or the same as
            Documents, made once for many layers.
        backend: "auto", "torch", or "naive", the oracle with its dense s x s bias.

    Returns:
        [batch, seq, heads, head_dim] in query's dtype.

    Raises:
        ValueError: shapes do not fit or the backend is unknown.
        TypeError: float32 on a GPU, for which there is no flash kernel.
    """
    _check(query, merge_logits, key, value)
    form = Form(0, "merge", _kernel(query, softmax_scale, bias_channel))
    return _attend(States(query, None, None, key, value, merge_logits), form, document_starts, backend)


def causal_attention(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    *,
    softmax_scale: float | None = None,
    document_starts: Tensor | Documents | None = None,
) -> Tensor:
    """Plain causal attention to all keys of a document; arguments as dmc_attention's."""
    form = Form(0, None, _kernel(query, softmax_scale))
    return _flash(States(query, key, value, None, None, None), form, document_starts)


def windowed_dmc_attention(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    pooled_key: Tensor,
    pooled_value: Tensor,
    merge_logits: Tensor,
    *,
    local_window: int,
    operation: Operation = "merge",
    omega: Tensor | None = None,
    softmax_scale: float | None = None,
    bias_channel: int | None = None,
    document_starts: Tensor | Documents | None = None,
    backend: str = "auto",
) -> Tensor:
    """Attention where a decision takes effect when its token is ``local_window`` tokens old (algorithm.md, section 7).

    Query i sees the raw keys j > i - local_window, and of older tokens for ``merge`` the slot states j <= i - local_window
    with bias [j < i - local_window] log(1 - alpha_{j+1}), for ``evict`` (DMS, arXiv 2506.05345) the raw keys with bias
    log(1 - alpha_j). ``absorb`` is ``evict`` with one more key per query, the residual slot: with the weights
    alpha_j omega_j, their sum N and the weighted means K and V of the raw keys and values over j <= i - local_window, it has
    the score q_i . K / sqrt(d) + log N and the value V. Costs about local_window / seq more than dmc_attention, which it is
    at local_window 0.

    Args:
        query, key, value: raw, query and key rotated; shapes as dmc_attention's.
        pooled_key, pooled_value: as key and value, after pooling, the key rotated. Read by ``merge`` only.
        merge_logits: as dmc_attention's; the first token is never evicted or absorbed.
        local_window: tokens kept raw, >= 0; without ``merge`` >= 1 (at 0 a token would be gone before any query sees it).
        operation: what becomes of a token with alpha 1 that leaves the window.
        omega: [batch, seq, kv_heads], >= 0, the tokens' weights in the residual slot. Keep them in float32. For ``absorb``
            only.
        softmax_scale, bias_channel, document_starts, backend: as dmc_attention's; the bias channel is zero in pooled_key too.

    Returns:
        [batch, seq, heads, head_dim] in query's dtype; differentiable in all tensors.

    Raises:
        ValueError, TypeError: as dmc_attention; a local_window that is negative, or 0 without ``merge``; no omega for
            ``absorb``, or one for another operation.
    """
    check_operation(operation, local_window, omega)
    if operation != "merge":
        pooled_key, pooled_value = key, value
    elif local_window == 0:
        return dmc_attention(
            query,
            pooled_key,
            pooled_value,
            merge_logits,
            softmax_scale=softmax_scale,
            bias_channel=bias_channel,
            document_starts=document_starts,
            backend=backend,
        )
    _check(query, merge_logits, key, value, pooled_key, pooled_value)
    if omega is not None and omega.shape != key.shape[:3]:
        raise ValueError(f"omega must be [b, s, kv_heads] = {tuple(key.shape[:3])}, got {tuple(omega.shape)}")
    states = States(query, key, value, pooled_key, pooled_value, merge_logits, omega)
    if operation != "merge":
        states = states._replace(far_key=None, far_value=None)
    form = Form(local_window, operation, _kernel(query, softmax_scale, bias_channel))
    return _attend(states, form, document_starts, backend)


def _kernel(query: Tensor, softmax_scale: float | None, bias_channel: int | None = None) -> KernelSettings:
    scale = 1 / math.sqrt(query.shape[-1]) if softmax_scale is None else softmax_scale
    return KernelSettings(scale, bias_channel=bias_channel)


def _attend(states: States, form: Form, document_starts: Tensor | Documents | None, backend: str) -> Tensor:
    implementation = choose(backend, {"torch": _flash, "naive": _dense})
    return implementation(states, form, document_starts)


def _flash(states: States, form: Form, document_starts: Tensor | Documents | None) -> Tensor:
    """On stock flash kernels. Rows of one document each need no boundaries."""
    if isinstance(document_starts, Tensor):
        several = bool(document_starts[:, 1:].any())
        document_starts = Documents.from_starts(document_starts) if several else None
    return attend_whole(states, replace(form, kernel=replace(form.kernel, documents=document_starts)))


def _dense(states: States, form: Form, document_starts: Tensor | Documents | None) -> Tensor:
    """The oracle, with its dense s x s bias."""
    query, key, value, far_key, far_value, merge_logits, omega = states
    if isinstance(document_starts, Documents):
        document_starts = document_starts.starts.view(query.shape[:2])
    scale = form.kernel.softmax_scale
    assert merge_logits is not None and form.operation is not None
    if form.local_window == 0:
        assert far_key is not None and far_value is not None
        return naive.dmc_attention(query, far_key, far_value, merge_logits, scale, document_starts)[0]
    assert key is not None and value is not None
    return naive.windowed_dmc_attention(
        query,
        key,
        value,
        key if far_key is None else far_key,
        value if far_value is None else far_value,
        merge_logits,
        local_window=form.local_window,
        operation=form.operation,
        omega=omega,
        softmax_scale=scale,
        document_starts=document_starts,
    )[0]


def _check(query: Tensor, merge_logits: Tensor, key: Tensor, *others: Tensor) -> None:
    kv_heads = key.shape[2]
    shapes = [tuple(x.shape) for x in (key, *others)]
    if len(set(shapes)) > 1 or query.shape[2] % kv_heads or query.shape[:2] != key.shape[:2]:
        raise ValueError(
            "attention needs query [b, s, heads, d], keys and values [b, s, kv_heads, d] with kv_heads dividing heads; "
            f"got query {tuple(query.shape)}, keys and values {', '.join(map(str, shapes))}"
        )
    if merge_logits.shape != key.shape[:3]:
        raise ValueError(
            f"merge_logits must be [b, s, kv_heads] = {tuple(key.shape[:3])}, got {tuple(merge_logits.shape)}"
        )
