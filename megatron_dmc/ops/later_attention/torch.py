"""later_attention in blocks of queries: each block sees all its keys, so its softmax is whole, and is then forgotten."""

import torch
from torch import Tensor

from megatron_dmc.ops.later_attention.types import Tokens
from megatron_dmc.ops.matrix_product import matrix_product

# Scores that are held at a time. A CPU's cache holds 4 MB of them; a GPU is busy with 256 MB.
MOST_SCORES = {"cpu": 2**20, "cuda": 2**26}


def later_attention(queries: Tokens, keys: Tokens, local_window: int, softmax_scale: float) -> Tensor:
    """Arguments and result as the public function's; logarithms throughout, because small shares underflow."""
    batch, seq, kv_heads, _ = keys.vectors.shape
    _, count, heads, _ = queries.vectors.shape
    wide = torch.promote_types(queries.vectors.dtype, torch.float32)
    # [batch, kv_heads, head_dim, seq]
    key = keys.vectors.permute(0, 2, 3, 1).to(wide)
    largest = key.new_full((batch, kv_heads, heads // kv_heads, seq), float("-inf"))
    rows = max(MOST_SCORES[key.device.type] // (batch * heads * seq), 1)
    parts = [slice(begin, begin + rows) for begin in range(0, count, rows)]
    # Keys rise: all before its window are seen by each query of a part, none after the part's last query is. The host waits
    # for a GPU here, once.
    first, last = torch.stack([torch.stack(queries.positions[part].aminmax()) for part in parts]).unbind(-1)
    bounds = torch.searchsorted(keys.positions, torch.stack([first - local_window, last]), right=True).tolist()
    for part, near, end in zip(parts, *bounds, strict=True):
        block = queries.vectors[:, part].unflatten(2, (kv_heads, -1)).permute(0, 2, 3, 1, 4).to(wide)
        scores = matrix_product(block.flatten(2, 3) * softmax_scale, key[..., :end])
        scores = scores.unflatten(2, (-1, block.shape[3]))  # [batch, kv_heads, group, rows, end]
        if queries.documents is not None and keys.documents is not None:
            others = queries.documents[:, part, None] != keys.documents[:, None, :end]
            scores.masked_fill_(others[:, None, None], float("-inf"))
        age = queries.positions[part, None] - keys.positions[near:end]
        scores[..., near:].masked_fill_(age < 0, float("-inf"))
        total = scores.logsumexp(-1) + queries.log_weight[:, None, None, part].to(wide)
        scores[..., near:].masked_fill_(age < local_window, float("-inf"))
        scores -= total[..., None]
        torch.maximum(largest[..., :end], scores.amax(3), out=largest[..., :end])
    weighted = largest + keys.log_weight.transpose(1, 2).unflatten(1, (kv_heads, -1)).to(wide)
    return weighted.amax(dim=2).transpose(1, 2)
