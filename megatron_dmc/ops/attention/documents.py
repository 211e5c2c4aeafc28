"""Packed documents as rows of their own: attention that never crosses a boundary, without a mask."""

from collections.abc import Callable

import torch
from torch import Tensor


def attend_documents(
    attend: Callable[..., tuple[Tensor, Tensor]], document_starts: Tensor, tensors: tuple[Tensor, ...]
) -> tuple[Tensor, Tensor]:
    """Calls ``attend`` on the documents of all rows, laid side by side by length.

    Documents are grouped by the power of two above their length, so that padding at most doubles the work and there are
    at most log2(seq) calls. Padding stands behind a document, where causal attention never sees it.

    Args:
        attend: maps tensors [documents, length, ...] to (out, lse) of the same leading sizes.
        document_starts: bool [batch, seq], true at every row's first token.
        tensors: each [batch, seq, ...].

    Returns:
        out, lse: [batch, seq, ...].
    """
    batch, seq = document_starts.shape
    begin = document_starts.flatten().nonzero()[:, 0]
    length = torch.diff(begin, append=begin.new_tensor([batch * seq]))
    bucket = torch.ceil(torch.log2(length.double())).long()
    flat = [x.flatten(0, 1) for x in tensors]

    results: tuple[list[Tensor], list[Tensor]] = ([], [])
    places = []
    for size in bucket.unique().tolist():
        chosen = bucket == size
        offset = torch.arange(int(length[chosen].max()), device=begin.device)
        inside = offset < length[chosen, None]
        # Behind a document's end its own first token stands in; what comes out there is dropped.
        index = begin[chosen, None] + offset * inside
        for result, part in zip(results, attend(*(x[index] for x in flat)), strict=True):
            result.append(part[inside])
        places.append(index[inside])
    order = torch.cat(places).argsort()
    out, lse = (torch.cat(result)[order].unflatten(0, (batch, seq)) for result in results)
    return out, lse
