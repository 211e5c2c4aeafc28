"""Packed documents: tokens of several texts one after another, where no text sees another."""

from collections.abc import Callable
from dataclasses import dataclass, field
from functools import cached_property
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor


@dataclass(frozen=True)
class Documents:
    """Where documents lie among the tokens of all rows, one row after another: [batch, seq] read row by row.

    Attributes:
        cu_seqlens: int32 [documents + 1], where each begins, and the number of tokens.
        tokens: their number, batch * seq.
        longest: no document is longer; at least 2, because a flash kernel takes another path for 1.
    """

    cu_seqlens: Tensor
    tokens: int
    longest: int
    _later: dict[int, tuple["Documents", Tensor]] = field(default_factory=dict, repr=False, compare=False)
    _parts: dict[tuple[int, int], "Documents"] = field(default_factory=dict, repr=False, compare=False)

    @classmethod
    def from_starts(cls, starts: Tensor) -> "Documents":
        """From bool [batch, seq], true at the first token of a document (a row's first token always is). Waits for a GPU."""
        batch, seq = starts.shape
        starts = torch.cat([torch.ones_like(starts[:, :1]), starts[:, 1:]], dim=1)
        begins = starts.flatten().nonzero()[:, 0]
        return cls(F.pad(begins, (0, 1), value=batch * seq).int(), batch * seq, max(seq, 2))

    @cached_property
    def starts(self) -> Tensor:
        """bool [tokens], true at the first token of a document."""
        marks = torch.zeros(self.tokens + 1, dtype=torch.bool, device=self.cu_seqlens.device)
        # Empty documents may come last.
        return marks.index_fill_(0, self.cu_seqlens[:-1].long(), True)[:-1]

    @cached_property
    def positions(self) -> Tensor:
        """int64 [tokens], each token's place in its document."""
        begins = self.cu_seqlens[:-1].long()
        return torch.arange(self.tokens, device=begins.device) - begins[self.number]

    @cached_property
    def remaining(self) -> Tensor:
        """int64 [tokens], how many tokens of its document come after each."""
        ends = self.cu_seqlens[1:].long()
        return ends[self.number] - 1 - torch.arange(self.tokens, device=ends.device)

    @cached_property
    def number(self) -> Tensor:
        """int64 [tokens], which document each belongs to."""
        tokens = torch.arange(self.tokens, device=self.cu_seqlens.device)
        return torch.searchsorted(self.cu_seqlens[1:].long(), tokens, right=True)

    def later(self, window: int) -> tuple["Documents", Tensor]:
        """The documents without their first ``window`` tokens, and which tokens remain, int64. Waits for a GPU, once."""
        if window not in self._later:
            lengths = (torch.diff(self.cu_seqlens) - window).clamp(min=0)
            left = (self.positions >= window).nonzero()[:, 0]
            ends = F.pad(lengths.cumsum(0, dtype=torch.int32), (1, 0))
            self._later[window] = Documents(ends, len(left), max(self.longest - window, 2)), left
        return self._later[window]

    def part(self, batch: int, tokens: slice) -> "Documents":
        """The documents of these tokens of each of ``batch`` rows, cut where the tokens end. Waits for a GPU, once."""
        place = tokens.start, tokens.stop
        if place not in self._parts:
            self._parts[place] = Documents.from_starts(self.starts.view(batch, -1)[:, tokens])
        return self._parts[place]

    @cached_property
    def groups(self) -> list[tuple[Tensor, Tensor]]:
        """Documents as rows: for each group the places of its tokens, [documents, length], and bool, which of them are real.

        Grouped by the power of two above their length: padding at most doubles the work, and there are at most log2(longest)
        groups. Padding repeats a document's first token and comes after the document, where causal attention never sees it.
        """
        length = torch.diff(self.cu_seqlens.long())
        begin, length = self.cu_seqlens[:-1].long()[length > 0], length[length > 0]
        bucket = torch.ceil(torch.log2(length.double())).long()
        groups = []
        for size in bucket.unique().tolist():
            chosen = bucket == size
            offset = torch.arange(int(length[chosen].max()), device=begin.device)
            inside = offset < length[chosen, None]
            groups.append((begin[chosen, None] + offset * inside, inside))
        return groups


def by_documents(documents: Documents, kernel: Callable[..., tuple[Any, ...]], *tensors: Tensor | None) -> list[Any]:
    """Runs a kernel that knows no boundaries on documents as rows.

    Args:
        kernel: maps (which tokens are real, bool [documents, length]; the tensors, [documents, length, ...]) to results of
            the same leading sizes, or None.
        tensors: [1, tokens, ...].

    Returns:
        [1, tokens, ...] of every result, or None.
    """
    results: list[Any] = []
    for index, inside in documents.groups:
        found = kernel(inside, *(None if x is None else x[0, index] for x in tensors))
        if not results:
            results = [None if x is None else x.new_empty((1, documents.tokens, *x.shape[2:])) for x in found]
        for result, x in zip(results, found, strict=True):
            if result is not None:
                result[0, index[inside]] = x[inside]
    return results
