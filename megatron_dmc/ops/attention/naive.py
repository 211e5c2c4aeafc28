"""Attention over all intermediate slot states with its dense s x s bias: the oracle."""

import math

import torch
import torch.nn.functional as F
from torch import Tensor


def dmc_attention(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    merge_logits: Tensor,
    softmax_scale: float | None = None,
    document_starts: Tensor | None = None,
) -> tuple[Tensor, Tensor]:
    """s_ij = q_i . k~_j / sqrt(d) + [j < i] log(1 - alpha_{j+1}) for j <= i.

    Returns:
        out [batch, seq, heads, head_dim] and the rows' log-sum-exp [batch, seq, heads].
    """
    seq, heads, head_dim = query.shape[1:]
    group = heads // key.shape[2]
    key, value, merge_logits = (x.repeat_interleave(group, dim=2) for x in (key, value, merge_logits))

    log_keep = F.pad(F.logsigmoid(-merge_logits)[:, 1:], (0, 0, 0, 1))  # [B, S, H], log(1 - alpha_{j+1})
    bias = log_keep.transpose(1, 2)[:, :, None].expand(-1, -1, seq, -1)
    bias = bias.masked_fill(torch.eye(seq, dtype=torch.bool, device=bias.device), 0)

    scores = torch.einsum("bihd,bjhd->bhij", query, key) * (softmax_scale or 1 / math.sqrt(head_dim)) + bias
    hidden = torch.ones(seq, seq, dtype=torch.bool, device=scores.device).triu(1)
    if document_starts is not None:
        document = document_starts.cumsum(dim=1)
        hidden = hidden | (document[:, None, :, None] != document[:, None, None, :])
    scores = scores.masked_fill(hidden, float("-inf"))
    out = torch.einsum("bhij,bjhd->bihd", scores.softmax(-1), value)
    return out, scores.logsumexp(-1).transpose(1, 2)
