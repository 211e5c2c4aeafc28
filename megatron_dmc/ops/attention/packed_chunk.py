"""Attention of a context-parallel rank's chunk of rows that hold packed documents.

The chunk with the window before it is a row of packed documents itself, of which the first may have begun earlier. What that
document left before is one more part, without a diagonal: the keys of others are hidden there, and so are queries of others.
"""

import torch
import torch.nn.functional as F
from torch import Tensor

from megatron_dmc.ops.attention.documents import Documents
from megatron_dmc.ops.attention.faded import faded_backward, faded_forward
from megatron_dmc.ops.attention.windowed import Form, Keys, KeySums, attend, attend_backward, join


def attend_packed(query: Tensor, keys: Keys, begin: int, form: Form, documents: Documents) -> tuple[Tensor, Tensor]:
    """As ``attend``, with the documents of the whole rows; the form's own are None."""
    chunk = _Chunk(query, keys, begin, form, documents)
    out, lse = (chunk.queries(x) for x in attend(chunk.padded(query), chunk.keys, 0, chunk.form))
    if chunk.start:
        before, before_lse = faded_forward(query, *chunk.before, form.softmax_scale, form.bias_channel, causal=False)
        out, lse = join(out, lse, before, before_lse.masked_fill(~chunk.continues[..., None], float("-inf")))
    return out, lse


def attend_packed_backward(
    grad_out: Tensor,
    query: Tensor,
    keys: Keys,
    begin: int,
    out: Tensor,
    lse: Tensor,
    form: Form,
    documents: Documents,
    sums: KeySums,
) -> Tensor:
    """As ``attend_backward``."""
    chunk = _Chunk(query, keys, begin, form, documents)
    own = KeySums(chunk.keys, form, sums.far_key.dtype)
    grad, part, part_out, part_lse = (chunk.padded(x) for x in (grad_out, query, out, lse))
    d_query = chunk.queries(attend_backward(grad, part, chunk.keys, 0, part_out, part_lse, chunk.form, own))
    sums.add_rows(own, slice(chunk.start, chunk.end))
    if chunk.start:
        # An infinite log-sum-exp: such a query has no share in these keys.
        unseen = lse.masked_fill(~chunk.continues[..., None], float("inf"))
        settings = form.softmax_scale, form.bias_channel
        gradients = faded_backward(grad_out, query, *chunk.before, out, unseen, *settings, causal=False)
        sums.add_far(gradients, slice(0, chunk.start))
        d_query = d_query + gradients.query
    return d_query


class _Chunk:
    """Tokens ``start``, ..., ``end`` - 1 of every row, one after another, as a problem of their own.

    Attributes:
        before: far keys, values and fading of all tokens before ``start``; those of documents that ended are hidden.
        continues: bool [batch, queries], of the document that the token before ``start`` belongs to.
    """

    def __init__(self, query: Tensor, keys: Keys, begin: int, form: Form, documents: Documents) -> None:
        self.batch, queries = query.shape[:2]
        self.start, self.end = max(begin - form.local_window, 0), begin + queries
        self.front = begin - self.start
        part = slice(self.start, self.end)
        self.form = form._replace(documents=documents.part(self.batch, part))
        self.keys = Keys._make(None if x is None else _flat(x[:, part]) for x in keys)
        if self.start:
            number = documents.number.view(self.batch, -1)
            last = number[:, self.start - 1, None]
            self.continues = number[:, begin : self.end] == last
            ended = (number[:, : self.start] != last)[..., None]
            far_key, far_value, fading = (None if x is None else x[:, : self.start] for x in keys[2:])
            assert far_key is not None and far_value is not None
            if fading is None:
                wide = torch.promote_types(query.dtype, torch.float32)
                fading = far_key.new_full(far_key.shape[:3], float("-inf"), dtype=wide)
            self.before = far_key, far_value, fading.masked_fill(ended, float("inf"))

    def padded(self, x: Tensor) -> Tensor:
        """[batch, queries, ...] -> [1, batch * (end - start), ...]; in front of the queries stand zeros."""
        return _flat(F.pad(x, (0, 0) * (x.dim() - 2) + (self.front, 0)))

    def queries(self, x: Tensor) -> Tensor:
        """The inverse of padded."""
        return x.view(self.batch, -1, *x.shape[2:])[:, self.front :]


def _flat(x: Tensor) -> Tensor:
    return x.flatten(0, 1)[None]
