"""One decoding step with a layer's cache, by operations of torch: nothing is allocated that stays, nothing is read back."""

import torch
from torch import Tensor

from megatron_dmc.ops.decode.cells import Pages
from megatron_dmc.ops.decode.rows import Rows
from megatron_dmc.ops.decode.sequences import Step
from megatron_dmc.ops.residual.torch import LEAST_MASS
from megatron_dmc.ops.tokens import Tokens


def step(query: Tensor, new: Tokens, rows: Rows, call: Step, softmax_scale: float) -> Tensor:
    """Takes one token of every sequence into its rows, and lets its query see them.

    Args:
        query: [batch, heads, head_dim], before rotary embedding.
        new: [batch, kv_heads, ...], the key before rotary embedding; its cos and sin are not read.

    Returns:
        [batch, heads, head_dim], float32 or wider.
    """
    take_in(new, rows, call)
    grouped = torch.bmm(query, call.query_rotation).unflatten(1, (rows.kv_heads, -1)).flatten(0, 1)
    log_mass = rows.residual_state.mass.flatten().log() if rows.layout.absorbs else None
    out = attend(grouped, rows.pages(call), softmax_scale, reserved=(rows.layout.local_window, log_mass))
    return out.view_as(query)


def take_in(new: Tokens, rows: Rows, call: Step) -> None:
    """The token that leaves the ring, or the new one where there is no ring, takes effect; arguments as step's.

    Its slot is written as attention sees it: rotated. An open slot is thus written again at every token that it takes.
    """
    layout, slots, d = rows.layout, rows.cells.slots, rows.head_dim
    heads = (rows.batch, rows.kv_heads)
    one = call.one.expand(*heads, 1)
    column = rows.column.unflatten(0, heads)
    if layout.local_window:
        assert rows.decisions is not None
        decisions, place = rows.decisions.unflatten(0, heads), call.place[..., None].expand(*heads, 1)
        decided = torch.copysign(new.omega.to(decisions.dtype), torch.where(new.alpha, call.sign, call.appends))
        leaving = decisions.gather(-1, place)[..., 0]
        decisions.scatter_(-1, place, decided[..., None])
        appends, weight = leaving.signbit(), leaving.abs()
        column[..., 1].copy_(call.place)
    else:
        appends = call.first >= new.alpha
        weight = new.omega.to(torch.promote_types(new.key.dtype, torch.float32))
    if rows.recent is not None:
        column[..., -1].copy_(call.recent + layout.local_window)
    rows.open_pages(appends, call)
    column[..., 0].add_(appends)
    target = rows.ahead.gather(1, rows.column).unflatten(0, heads)
    if layout.local_window:
        old = slots.index_select(0, target[..., 1].flatten()).unflatten(0, heads).to(weight.dtype)
        entering = torch.baddbmm(call.unit, old, call.entrance) if layout.merges else old
        ring = [torch.bmm(new.key, call.key_rotation), new.value]
    else:
        entering, ring = torch.cat([new.key, new.value, one], dim=-1), []

    if not layout.merges:
        # A token that is not kept is written nowhere.
        target[..., 0].masked_fill_(~appends, rows.cells.nowhere)
    if rows.recent is not None:
        means = _mean_of_recent(entering, weight, appends, rows, target[..., -1])
    elif rows.sums is not None:
        sums = rows.sums.unflatten(0, heads)
        if layout.merges:
            sums.masked_fill_(appends[..., None], 0)
        else:
            weight = weight.masked_fill_(appends, 0)
            entering = torch.cat([entering, one], dim=-1)
        sums.addcmul_(entering, weight[..., None])
        total = sums[..., -1:] if layout.merges else sums[..., -1:].clamp(min=LEAST_MASS)
        means = sums[..., :-1] / total
    if layout.merges:
        written = [torch.bmm(means[..., :d], call.mean_rotation), means[..., d:], *ring]
        target = target[..., : 1 + bool(ring)]
    else:
        written = [entering[..., : 2 * d], *ring, *([means] if layout.absorbs else [])]
    rows.cells.write(target.flatten(), torch.cat(written, dim=-1).view(-1, 2 * d))


def _mean_of_recent(entering: Tensor, weight: Tensor, appends: Tensor, rows: Rows, target: Tensor) -> Tensor:
    """The open slot's mean over its last window_size tokens, [batch, kv_heads, 2 * head_dim].

    Args:
        entering: [batch, kv_heads, 2 * head_dim + 1], the token, not rotated.
        target: its slot, [batch, kv_heads].
    """
    assert rows.recent is not None
    slots, window = rows.cells.slots, rows.layout.local_window
    reserved = slice(window, rows.layout.base)
    rows.cells.write(target.flatten(), entering[..., :-1].flatten(0, 1), visible=False)
    rows.recent.masked_fill_(appends.reshape(-1, 1), 0)
    rows.recent.scatter_(1, rows.column[:, -1:] - window, weight.reshape(-1, 1))
    tokens = slots.index_select(0, rows.ahead[:, reserved].flatten()).view(len(rows.kept), -1, 2 * rows.head_dim)
    total = rows.recent.sum(1, keepdim=True).clamp_(min=LEAST_MASS)
    mean = torch.bmm(rows.recent[:, None], tokens.to(weight.dtype))[:, 0] / total
    return mean.view(*appends.shape, -1)


def attend(query: Tensor, pages: Pages, softmax_scale: float, *, reserved: tuple[int, Tensor | None]) -> Tensor:
    """One query per head over its row's slots; the pages are read in the order in which they lie in memory.

    Args:
        query: [rows, group, head_dim], rotated.
        reserved: a place in the rows' lists, and a bias of its slot, [rows] (None: none has one).

    Returns:
        [rows, group, head_dim], float32 or wider.
    """
    (rows, group, d), content = query.shape, pages.content
    query = query.index_select(0, pages.owner)
    if content.dtype in (torch.bfloat16, torch.float16) and not has_wide_products(content.device):
        content, query = content.float(), query.float()
    scores = _products(content[..., :d], query.mT, softmax_scale)  # [pages, page_size, group]
    scores.masked_fill_(pages.hidden[..., None], float("-inf"))
    # The scores of a row side by side. They are small beside keys and values, also where rows differ in length.
    lists = scores.new_full((rows * pages.width, *scores.shape[1:]), float("-inf"))
    lists = lists.index_copy_(0, pages.place, scores).view(rows, -1, group)
    place, bias = reserved
    if bias is not None and place < lists.shape[1]:
        lists[:, place].add_(bias[:, None])
    weights = lists.softmax(1).view(-1, *scores.shape[1:]).index_select(0, pages.place)
    parts = _products(weights.mT.to(content.dtype), content[..., d:])
    return parts.new_zeros(rows, group, d).index_add_(0, pages.owner, parts)


def has_wide_products(device: torch.device) -> bool:
    """Whether products of bf16 or fp16 can be had in float32: CUDA only, from torch 2.8 on."""
    return device.type == "cuda" and "dtype" in torch.ops.aten.bmm.overloads()


def _products(a: Tensor, b: Tensor, scale: float = 1.0) -> Tensor:
    """scale a @ b of matrices in float32 or wider. Scores rounded to bf16 would be off by much more than the keys are."""
    if a.dtype in (torch.bfloat16, torch.float16):
        products = torch.bmm(a, b, out_dtype=torch.float32)
        return products if scale == 1.0 else products.mul_(scale)
    if scale == 1.0:
        return torch.bmm(a, b)
    return torch.baddbmm(a.new_empty(1), a, b, beta=0, alpha=scale)
