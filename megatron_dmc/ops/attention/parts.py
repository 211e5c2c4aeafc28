"""Which keys consecutive queries see: near, before and own (the picture is in README.md)."""

from torch import Tensor

from megatron_dmc.ops.attention.types import Form


class Parts:
    """The keys that consecutive queries see, the first of which is token ``begin``.

    Attributes:
        near: the tokens that their local windows reach.
        front: how many of those come before the first query.
        later: the queries that see far keys.
        before: far keys that all of ``later`` see.
        own: the far keys that left the window one with each query of ``later``: a causal problem.
        documents: where documents lie in ``own``.
        empty: no query sees far keys.
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
        self.documents = form.kernel.documents
        if self.documents is not None and window:
            self.documents, later = self.documents.later(window)
            self.later, self.own = later, later - window
            self.empty = len(later) == 0
