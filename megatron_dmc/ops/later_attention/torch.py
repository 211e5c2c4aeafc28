"""later_attention in blocks of queries: each block sees all its keys, so its softmax is whole, and is then forgotten."""

import torch
from torch import Tensor

from megatron_dmc.ops.later_attention.types import Places
from megatron_dmc.ops.matrix_product import matrix_product

# Scores that are held at a time. A CPU's cache holds 4 MB of them; a GPU is busy with 256 MB.
MOST_SCORES = {"cpu": 2**20, "cuda": 2**26}


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
    """Arguments and result as the public function's; logarithms throughout, because small shares underflow."""
    batch, seq, kv_heads, _ = key.shape
    heads = query.shape[2]
    wide = torch.promote_types(query.dtype, torch.float32)
    # [batch, kv_heads, head_dim, seq]
    keys = key.permute(0, 2, 3, 1).to(wide)
    largest = keys.new_full((batch, kv_heads, heads // kv_heads, seq), float("-inf"))
    rows = max(MOST_SCORES[query.device.type] // (batch * heads * seq), 1)
    for begin in range(0, query.shape[1], rows):
        part = slice(begin, begin + rows)
        positions = query_places.positions[part]
        # Keys rise: none after the last of these is seen.
        end = int(torch.searchsorted(key_places.positions, positions.max(), right=True))
        block = query[:, part].unflatten(2, (kv_heads, -1)).permute(0, 2, 3, 1, 4).to(wide)
        count = block.shape[3]
        scores = matrix_product(block.flatten(2, 3) * softmax_scale, keys[..., :end])
        scores = scores.unflatten(2, (-1, count))  # [batch, kv_heads, group, rows, end]
        age = positions[:, None] - key_places.positions[:end]
        hidden = (age < 0)[None]
        if query_places.documents is not None and key_places.documents is not None:
            others = query_places.documents[:, part, None] != key_places.documents[:, None, :end]
            hidden = hidden | others
        scores.masked_fill_(hidden[:, None, None], float("-inf"))
        total = scores.logsumexp(-1) + query_weight[:, None, None, part].to(wide)
        scores.masked_fill_((age < local_window)[None, None, None], float("-inf"))
        scores -= total[..., None]
        torch.maximum(largest[..., :end], scores.amax(3), out=largest[..., :end])
    weighted = largest + key_weight.transpose(1, 2).unflatten(1, (kv_heads, -1)).to(wide)
    return weighted.amax(dim=2).transpose(1, 2)
