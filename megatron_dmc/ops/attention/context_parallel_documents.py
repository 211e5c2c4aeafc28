"""Attention of a context-parallel rank's chunk of rows that hold packed documents.

The chunk with the window before it is a row of packed documents itself, of which the first may have begun earlier. What that
document left before the chunk is one more part, without a diagonal. Keys of other documents are hidden there, and queries of
other documents have no share in it.
"""

from dataclasses import replace

import torch
import torch.nn.functional as F
from torch import Tensor

from megatron_dmc.ops.attention.fading_keys import FarKeys, fading_backward, fading_forward
from megatron_dmc.ops.attention.keys import KeyGradients, Keys
from megatron_dmc.ops.attention.slot_attention import Queries, attend, attend_backward
from megatron_dmc.ops.attention.types import Attended, Form, KernelSettings, join


def attend_packed(queries: Queries, keys: Keys, form: Form) -> Attended:
    """As ``attend``; the form's documents are those of the whole rows."""
    chunk = _Chunk(queries, keys, form)
    own = attend(Queries(chunk.padded(queries.query), 0), chunk.keys, chunk.form)
    result = Attended(*(chunk.queries(x) for x in own))
    if chunk.start:
        out, lse = fading_forward(queries.query, chunk.before, chunk.settings_before)
        result = join(result, Attended(out, lse.masked_fill(~chunk.continues[..., None], float("-inf"))))
    return result


def attend_packed_backward(
    grad_out: Tensor, queries: Queries, keys: Keys, final: Attended, form: Form, sums: KeyGradients
) -> Tensor:
    """As ``attend_backward``."""
    chunk = _Chunk(queries, keys, form)
    own = KeyGradients(chunk.keys, form, sums.far_key.dtype)
    grad, part, *of_part = (chunk.padded(x) for x in (grad_out, queries.query, *final))
    d_part = attend_backward(grad, Queries(part, 0), chunk.keys, Attended(*of_part), chunk.form, own)
    d_query = chunk.queries(d_part)
    sums.add_rows(own, slice(chunk.start, chunk.end))
    if chunk.start:
        # An infinite log-sum-exp: such a query has no share in these keys.
        seen = Attended(final.out, final.lse.masked_fill(~chunk.continues[..., None], float("inf")))
        gradients = fading_backward(grad_out, queries.query, chunk.before, seen, chunk.settings_before)
        sums.add_far(gradients, slice(0, chunk.start))
        d_query = d_query + gradients.query
    return d_query


class _Chunk:
    """Tokens ``start``, ..., ``end`` - 1 of every row, one after another, as a problem of their own.

    Attributes:
        keys, form: of the problem.
        front: how many of a row's tokens come before its first query.
        before: far keys of all tokens before ``start``; those of documents that ended are hidden.
        continues: bool [batch, queries], of the document that the token before ``start`` belongs to.
    """

    def __init__(self, queries: Queries, keys: Keys, form: Form) -> None:
        documents = form.kernel.documents
        assert documents is not None
        query, begin = queries
        self.batch = query.shape[0]
        self.start, self.end = max(begin - form.local_window, 0), begin + query.shape[1]
        self.front = begin - self.start
        part = slice(self.start, self.end)
        self.form = replace(form, kernel=replace(form.kernel, documents=documents.part(self.batch, part)))
        self.keys = Keys._make(None if x is None else _flat(x[:, part]) for x in keys)
        if self.start:
            number = documents.number.view(self.batch, -1)
            last = number[:, self.start - 1, None]
            self.continues = number[:, begin : self.end] == last
            ended = (number[:, : self.start] != last)[..., None]
            far_key, far_value, fade_logits = keys.far(slice(0, self.start))
            if fade_logits is None:
                wide = torch.promote_types(query.dtype, torch.float32)
                fade_logits = far_key.new_full(far_key.shape[:3], float("-inf"), dtype=wide)
            self.before = FarKeys(far_key, far_value, fade_logits.masked_fill(ended, float("inf")))

    @property
    def settings_before(self) -> KernelSettings:
        return replace(self.form.kernel, causal=False, documents=None)

    def padded(self, x: Tensor) -> Tensor:
        """[batch, queries, ...] -> [1, batch * (end - start), ...]; zeros come before each row's queries."""
        return _flat(F.pad(x, (0, 0) * (x.dim() - 2) + (self.front, 0)))

    def queries(self, x: Tensor) -> Tensor:
        """The inverse of padded."""
        return x.view(self.batch, -1, *x.shape[2:])[:, self.front :]


def _flat(x: Tensor) -> Tensor:
    return x.flatten(0, 1)[None]
