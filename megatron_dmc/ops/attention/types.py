"""Tensors and settings of attention that travel together."""

from dataclasses import dataclass
from typing import Literal, NamedTuple, get_args

import torch
from torch import Tensor

from megatron_dmc.ops.attention.documents import Documents

Operation = Literal["merge", "evict", "absorb"]


class States(NamedTuple):
    """What slot attention is differentiable in. A tensor that the form does not read is None.

    Attributes:
        query: [batch, seq, heads, head_dim], rotated.
        key, value: the raw ones, [batch, seq, kv_heads, head_dim], the key rotated; None: no query sees them.
        far_key, far_value: as key and value, what a token outside the local window has become: its slot as it was after the
            token had entered it, the key rotated. None: the raw key and value themselves.
        merge_logits: l, [batch, seq, kv_heads], alpha = sigmoid(l); None: no key fades.
        omega: [batch, seq, kv_heads], the weight of an absorbed token; None: none is absorbed.
    """

    query: Tensor
    key: Tensor | None
    value: Tensor | None
    far_key: Tensor | None
    far_value: Tensor | None
    merge_logits: Tensor | None
    omega: Tensor | None = None


class BiasedKeys(NamedTuple):
    """Keys as a flash kernel takes them.

    Attributes:
        key, value: [batch, seq_k, kv_heads, head_dim].
        bias: [batch, seq_k, kv_heads], added to every query's score and finite; None: nothing is added.
    """

    key: Tensor
    value: Tensor
    bias: Tensor | None


class Gradients(NamedTuple):
    """Of a kernel's query and BiasedKeys, in their shapes."""

    query: Tensor
    key: Tensor
    value: Tensor
    bias: Tensor | None


class Attended(NamedTuple):
    """The result of one softmax.

    Attributes:
        out: [batch, seq_q, heads, head_dim] in the query's dtype.
        lse: [batch, seq_q, heads], the logarithm of the sum of exp(score); float32 or wider.
    """

    out: Tensor
    lse: Tensor


def check_operation(operation: str, local_window: int, omega: Tensor | None) -> None:
    """Raises ValueError for an operation that there is not, or for what does not belong to it."""
    if operation not in get_args(Operation):
        *others, last = get_args(Operation)
        raise ValueError(f"operation must be {', '.join(others)} or {last}, got {operation!r}")
    least = int(operation != "merge")
    if local_window < least:
        raise ValueError(f"local_window must be >= {least} for {operation}, got {local_window}")
    if (omega is not None) != (operation == "absorb"):
        needs = "needs omega, the tokens' weights" if omega is None else "takes no omega; leave it out"
        raise ValueError(f"operation {operation} {needs}")


def join(one: Attended, other: Attended) -> Attended:
    """One softmax over the keys of both."""
    weight = torch.sigmoid(other.lse - one.lse).to(one.out.dtype)[..., None]
    return Attended(torch.lerp(one.out, other.out, weight), torch.logaddexp(one.lse, other.lse))


@dataclass(frozen=True)
class KernelSettings:
    """Settings of one call of a flash kernel.

    Attributes:
        softmax_scale: factor of q . k.
        causal: query i sees keys j <= i (seq_q == seq_k). False: all keys.
        window: of the keys j <= i only those with i - j < window; None: all. Only with ``causal``.
        bias_channel: a channel that is zero in query and key and may carry a bias; None: every channel counts.
        documents: where documents lie among tokens [1, tokens, ...]; no document sees another. None: a row is one document.
            Only with ``causal``.
    """

    softmax_scale: float
    causal: bool = True
    window: int | None = None
    bias_channel: int | None = None
    documents: Documents | None = None


@dataclass(frozen=True)
class Form:
    """Which attention is computed.

    Attributes:
        local_window: w, tokens that a query sees raw, its own the last; 0: none.
        operation: what becomes of a token with alpha 1 that leaves the window. None: it stays, attention is plain.
        kernel: settings of the kernels, causal and without a window of their own; ``documents`` are those of all rows.
    """

    local_window: int
    operation: Operation | None
    kernel: KernelSettings
