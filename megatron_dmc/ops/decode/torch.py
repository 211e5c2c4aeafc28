"""One decoding step with a layer's cache, by operations of torch: nothing is allocated that stays, nothing is read back."""

import torch
from torch import Tensor

from megatron_dmc.ops.decode.ahead import Pages
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
    target = take_in(new, rows, call)
    grouped = call.queries(query, rows.kv_heads)
    torch.bmm(query, call.query_rotation, out=grouped[:-1].view_as(query))
    if rows.layout.cache_dtype is not None:
        return attend_lists(grouped[:-1], rows, call, softmax_scale).view_as(query)
    return attend(grouped, rows.pages(target), softmax_scale, call.zeros(grouped[:-1])).view_as(query)


def take_in(new: Tokens, rows: Rows, call: Step) -> Tensor:
    """The token that leaves the ring, or the new one where there is no ring, takes effect; arguments as step's.

    Its slot is written as attention sees it: rotated. An open slot is thus written again at every token that it takes.

    Returns:
        The slots that are written, int64 [n].
    """
    layout, d = rows.layout, rows.head_dim
    heads = (rows.batch, rows.kv_heads)
    one = call.one.expand(*heads, 1)
    if layout.local_window:
        assert rows.decisions is not None
        decisions, place = rows.decisions.unflatten(0, heads), call.place[..., None].expand(*heads, 1)
        decided = torch.copysign(new.omega, torch.where(new.alpha, call.sign, call.appends)).to(decisions.dtype)
        leaving = decisions.gather(-1, place)[..., 0]
        decisions.scatter_(-1, place, decided[..., None])
        appends = torch.signbit(leaving, out=rows.appends)
        # With absorb, what is kept adds nothing.
        weight = leaving.clamp(min=0) if layout.absorbs else leaving.abs()
    else:
        appends = torch.ge(call.first, new.alpha, out=rows.appends)
        weight = new.omega.to(torch.promote_types(new.key.dtype, torch.float32))
    ahead = rows.open_pages()
    column = ahead.column.add_(ahead.moves)
    # A token that is neither kept nor merged is written nowhere.
    target = ahead.slots.gather(1, column if layout.merges else column * ahead.moves).unflatten(0, heads)
    if layout.local_window:
        entering = rows.cells.read(target[..., 1])
        if rows.recent is not None:
            entering = torch.bmm(entering.to(weight.dtype), call.entrance[..., :-1])
        elif layout.merges:
            entering = torch.baddbmm(call.unit, entering.to(weight.dtype), call.entrance)
        ring = [torch.bmm(new.key, call.key_rotation), new.value]
    else:
        entering, ring = torch.cat([new.key, new.value, *([] if rows.recent is not None else [one])], dim=-1), []

    if rows.recent is not None:
        means = _mean_of_recent(entering, weight, appends, target[..., -1], rows, call)
    elif rows.sums is not None:
        sums = rows.sums.unflatten(0, heads)
        if layout.merges:
            sums.masked_fill_(appends[..., None], 0)
        sums.addcmul_(entering if layout.merges else torch.cat([entering, one], dim=-1), weight[..., None])
        total = sums[..., -1:] if layout.merges else sums[..., -1:].clamp(min=LEAST_MASS)
        means = sums[..., :-1] / total
        if layout.absorbs:
            torch.log(sums[..., -1], out=ahead.bias.unflatten(0, heads)[..., -1])
    if layout.merges:
        written = [torch.bmm(means[..., :d], call.mean_rotation), means[..., d:], *ring]
        # Once more, so that what is written is one tensor.
        written += [entering] if rows.recent is not None else []
    else:
        written = [entering, *ring, *([means] if layout.absorbs else [])]
    torch.cat(written, dim=-1, out=ahead.content.view(*heads, -1))
    rows.cells.write(target.flatten(), ahead.content.flatten(0, 1))
    return target.flatten()


def _mean_of_recent(
    entering: Tensor, weight: Tensor, appends: Tensor, target: Tensor, rows: Rows, call: Step
) -> Tensor:
    """The open slot's mean over its last window_size tokens, [batch, kv_heads, 2 * head_dim].

    Args:
        entering: [batch, kv_heads, 2 * head_dim], the token, not rotated.
        target: its slot, [batch, kv_heads].
    """
    ahead = rows.ahead
    assert ahead is not None and rows.recent is not None
    rows.cells.write(target.flatten(), entering.flatten(0, 1))
    recent = rows.recent.unflatten(0, appends.shape)
    recent.masked_fill_(appends[..., None], 0)
    recent.scatter_(-1, call.recent[..., None].expand(*appends.shape, 1), weight[..., None])
    tokens = rows.cells.read(ahead.reserved).view(*rows.recent.shape, -1)
    mean = torch.bmm(rows.recent[:, None], tokens.to(weight.dtype)).view_as(entering)
    # Where there is no open slot yet, it is the mean of nothing, which must be finite.
    total = torch.addmv(ahead.least, rows.recent, ahead.ones)
    return mean / total.view(*appends.shape, 1)


def attend(query: Tensor, pages: Pages, softmax_scale: float, zeros: Tensor) -> Tensor:
    """One query per head over its row's slots; the pages are read in the order in which they lie in memory.

    Args:
        query: [rows + 1, group, head_dim], rotated; the last one is zero, the query of nobody's page.
        zeros: [rows, group, head_dim], float32 or wider.

    Returns:
        [rows, group, head_dim], float32 or wider.
    """
    (rows, group, d), content = zeros.shape, pages.content
    query = query.index_select(0, pages.owner)
    if content.dtype in (torch.bfloat16, torch.float16) and not has_wide_products(content.device):
        content, query = content.float(), query.float()
    scores = _scores(content[..., :d], query.mT, softmax_scale, pages.bias[..., None])  # [pages + 1, page_size, group]
    # The scores of a row side by side. They are small beside keys and values, also where rows differ in length.
    weights = scores.index_select(0, pages.page).view(rows, -1, group).softmax(1)
    weights = weights.view(-1, *scores.shape[1:]).index_select(0, pages.place)
    parts = _products(weights.mT.to(content.dtype), content[:-1, :, d:])
    return zeros.index_add(0, pages.owner[:-1], parts)


def attend_lists(query: Tensor, rows: Rows, call: Step, softmax_scale: float) -> Tensor:
    """The same where slots are codes: of all rows at once, as they are given back.

    Args:
        query: [rows, group, head_dim], rotated.

    Returns:
        [rows, group, head_dim], float32 or wider.
    """
    lists, d = rows.cells.dense(), rows.head_dim
    row = torch.arange(len(query), device=query.device)
    place = torch.arange(lists.shape[1], device=query.device).expand(len(query), -1)
    bias = rows.bias_at(row, place, rows.count.flatten(), call.tokens)
    # Where a row has no page lies another's, and 0 * NaN is NaN.
    lists = lists.masked_fill_((bias == float("-inf"))[..., None], 0)
    scores = torch.baddbmm(bias[:, None], query.to(lists.dtype), lists[..., :d].mT, alpha=softmax_scale)
    return torch.bmm(scores.softmax(-1), lists[..., d:])


def has_wide_products(device: torch.device) -> bool:
    """Whether products of bf16 or fp16 can be had in float32: CUDA only, from torch 2.8 on."""
    return device.type == "cuda" and "dtype" in torch.ops.aten.bmm.overloads()


def _scores(keys: Tensor, query: Tensor, scale: float, bias: Tensor) -> Tensor:
    """scale keys @ query + bias, in float32 or wider."""
    if keys.dtype == bias.dtype:
        return torch.baddbmm(bias, keys, query, alpha=scale)
    return _products(keys, query).mul_(scale).add_(bias)


def _products(a: Tensor, b: Tensor) -> Tensor:
    """a @ b of matrices in float32 or wider. Scores rounded to bf16 would be off by much more than the keys are."""
    if a.dtype in (torch.bfloat16, torch.float16):
        return torch.bmm(a, b, out_dtype=torch.float32)
    return torch.bmm(a, b)
