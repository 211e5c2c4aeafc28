"""What later_attention takes: queries, and keys."""

from typing import NamedTuple

from torch import Tensor


class Tokens(NamedTuple):
    """Queries or keys, and where they stand.

    Attributes:
        vectors: [batch, tokens, heads, head_dim], rotated; of keys, as many heads as there are KV heads.
        log_weight: of queries, log v [batch, tokens], what a share is divided by; of keys, log u [batch, tokens, heads] with
            all query heads, what it is worth.
        positions: int64 [tokens], in the sample; rising for keys.
        documents: int64 [batch, tokens], which document each token belongs to; None: a row is one document.
    """

    vectors: Tensor
    log_weight: Tensor
    positions: Tensor
    documents: Tensor | None = None
