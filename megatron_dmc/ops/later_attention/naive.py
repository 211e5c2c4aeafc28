"""later_attention with its s x s attention: the oracle."""

import torch
from torch import Tensor

from megatron_dmc.ops.later_attention.types import Tokens


def later_attention(queries: Tokens, keys: Tokens, local_window: int, softmax_scale: float) -> Tensor:
    """score_j = log max over i, h of softmax_j(q_hi . k_j) u_hj / v_i, where i - j >= local_window."""
    batch, _, kv_heads, _ = keys.vectors.shape
    repeated = keys.vectors.repeat_interleave(queries.vectors.shape[2] // kv_heads, dim=2)
    scores = softmax_scale * torch.einsum("bihd,bjhd->bhij", queries.vectors, repeated)
    age = queries.positions[:, None] - keys.positions
    seen = (age >= 0).expand(batch, 1, -1, -1)
    if queries.documents is not None and keys.documents is not None:
        seen = seen & (queries.documents[:, None, :, None] == keys.documents[:, None, None])
    attention = scores.masked_fill(~seen, float("-inf")).softmax(-1)
    weighted = (
        attention * keys.log_weight.exp().transpose(1, 2)[:, :, None] / queries.log_weight.exp()[:, None, :, None]
    )
    largest = weighted.masked_fill(~(seen & (age >= local_window)), 0).amax(dim=2)  # [batch, heads, seq]
    return largest.unflatten(1, (kv_heads, -1)).amax(dim=2).log().transpose(1, 2)
