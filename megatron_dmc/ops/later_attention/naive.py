"""later_attention with its s x s attention: the oracle."""

import torch
from torch import Tensor

from megatron_dmc.ops.later_attention.types import Places


def later_attention(
    query: Tensor,
    key: Tensor,
    *,
    query_places: Places,
    key_places: Places,
    query_weight: Tensor,
    key_weight: Tensor,
    local_window: int,
    softmax_scale: float,
) -> Tensor:
    """score_j = log max over i, h of softmax_j(q_hi . k_j) u_hj / v_i, where i - j >= local_window."""
    batch, _, kv_heads, _ = key.shape
    key = key.repeat_interleave(query.shape[2] // kv_heads, dim=2)
    scores = softmax_scale * torch.einsum("bihd,bjhd->bhij", query, key)
    age = query_places.positions[:, None] - key_places.positions
    seen = (age >= 0).expand(batch, 1, -1, -1)
    if query_places.documents is not None and key_places.documents is not None:
        seen = seen & (query_places.documents[:, None, :, None] == key_places.documents[:, None, None])
    attention = scores.masked_fill(~seen, float("-inf")).softmax(-1)
    weighted = attention * key_weight.exp().transpose(1, 2)[:, :, None] / query_weight.exp()[:, None, :, None]
    largest = weighted.masked_fill(~(seen & (age >= local_window)), 0).amax(dim=2)  # [batch, heads, seq]
    return largest.unflatten(1, (kv_heads, -1)).amax(dim=2).log().transpose(1, 2)
