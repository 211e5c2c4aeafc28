"""Where tokens stand, for later_attention."""

from typing import NamedTuple

from torch import Tensor


class Places(NamedTuple):
    """Tokens of one kind (queries or keys).

    Attributes:
        positions: int64 [seq], in the sample; rising for keys.
        documents: int64 [batch, seq], which document each token belongs to; None: a row is one document.
    """

    positions: Tensor
    documents: Tensor | None = None
