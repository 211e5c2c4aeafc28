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

    log_keep = F.pad(F.logsigmoid(-merge_logits)[:, 1:], (0, 0, 0, 1))  # [batch, seq, heads], log(1 - alpha_{j+1})
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


def windowed_dmc_attention(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    pooled_key: Tensor,
    pooled_value: Tensor,
    merge_logits: Tensor,
    *,
    local_window: int,
    operation: str,
    omega: Tensor | None = None,
    softmax_scale: float | None = None,
    document_starts: Tensor | None = None,
) -> tuple[Tensor, Tensor]:
    """Query i sees raw keys j > i - w, and what became of the keys j <= i - w.

    merge: k~_j, biased by log(1 - alpha_{j+1}) where token j + 1 was merged too (j < i - w).
    evict: k_j, biased by log(1 - alpha_j); alpha is 0 at the first token of a document.
    absorb: as evict, and the mean of the k_j with weights alpha_j omega_j, biased by the logarithm of their sum.
    """
    seq, heads, head_dim = query.shape[1:]
    group = heads // key.shape[2]
    tensors = (key, value, pooled_key, pooled_value, merge_logits)
    key, value, pooled_key, pooled_value, merge_logits = (x.repeat_interleave(group, dim=2) for x in tensors)
    starts = torch.zeros(query.shape[:2], dtype=torch.bool, device=query.device)
    if document_starts is not None:
        starts = starts | document_starts
    starts[:, 0] = True
    document = starts.cumsum(dim=1)

    i, j = torch.arange(seq, device=query.device)[:, None], torch.arange(seq, device=query.device)
    same = document[:, None, :, None] == document[:, None, None, :]
    scale = softmax_scale or 1 / math.sqrt(head_dim)
    near = torch.einsum("bihd,bjhd->bhij", query, key) * scale
    near = near.masked_fill(~((j <= i) & (i - j < local_window) & same), float("-inf"))

    # [batch, heads, seq], log(1 - alpha_j)
    log_keep = F.logsigmoid(-merge_logits).masked_fill(starts[..., None], 0).transpose(1, 2)
    if operation == "merge":
        log_keep = F.pad(log_keep[..., 1:], (0, 1))[:, :, None]  # log(1 - alpha_{j+1})
        far_key, far_value, bias = pooled_key, pooled_value, torch.where(j < i - local_window, log_keep, 0)
    else:
        far_key, far_value, bias = key, value, log_keep[:, :, None]
    far = torch.einsum("bihd,bjhd->bhij", query, far_key) * scale + bias
    far = far.masked_fill(~((j <= i - local_window) & same), float("-inf"))

    scores = torch.cat([near, far], dim=-1)
    if operation != "absorb":
        out = torch.einsum("bhij,bjhd->bihd", scores.softmax(-1), torch.cat([value, far_value], dim=1))
        return out, scores.logsumexp(-1).transpose(1, 2)
    assert omega is not None
    alpha = torch.sigmoid(merge_logits).masked_fill(starts[..., None], 0)
    weight = (alpha * omega.repeat_interleave(group, dim=2)).transpose(1, 2)[:, :, None]  # [batch, heads, 1, seq]
    weight = torch.where((j <= i - local_window) & same, weight, 0)  # [batch, heads, seq, seq]
    mass = weight.sum(-1)
    empty = mass == 0
    share = weight / mass.masked_fill(empty, 1)[..., None]
    mean_key, mean_value = (torch.einsum("bhij,bjhd->bhid", share, x) for x in (key, value))
    residual = torch.einsum("bihd,bhid->bhi", query, mean_key) * scale + mass.masked_fill(empty, 1).log()
    scores = torch.cat([scores, residual.masked_fill(empty, float("-inf"))[..., None]], dim=-1)
    share = scores.softmax(-1)
    out = torch.einsum("bhij,bjhd->bihd", share[..., :-1], torch.cat([value, far_value], dim=1))
    out = out + torch.einsum("bhi,bhid->bihd", share[..., -1], mean_value)
    return out, scores.logsumexp(-1).transpose(1, 2)
