"""Many tokens at once: attention among them as in training, and to what the cache holds, joined by log-sum-exps."""

from dataclasses import replace

import torch
import torch.nn.functional as F
from torch import Tensor

from megatron_dmc.ops.attention.diagonal import diagonal_forward
from megatron_dmc.ops.attention.fading_keys import FarKeys
from megatron_dmc.ops.attention.flash import HIDDEN, flash_forward
from megatron_dmc.ops.attention.one_key import OneKey, join_one_key
from megatron_dmc.ops.attention.types import Attended, BiasedKeys, KernelSettings, join
from megatron_dmc.ops.decisions import hard_merge_logits
from megatron_dmc.ops.decode import cpp, triton
from megatron_dmc.ops.decode.rows import Rows
from megatron_dmc.ops.decode.sequences import Chunk
from megatron_dmc.ops.pooling import pool
from megatron_dmc.ops.residual import residual
from megatron_dmc.ops.residual.torch import LEAST_MASS
from megatron_dmc.ops.rotary import rotate, unrotate
from megatron_dmc.ops.tokens import Tokens, take


def take_in_chunk(query: Tensor, new: Tokens, rows: Rows, call: Chunk, softmax_scale: float) -> Tensor:
    """Takes the next tokens of every sequence into its rows, and lets their queries see them and all before.

    Args:
        query: [batch, seq, heads, head_dim], before rotary embedding.
        new: the key before rotary embedding; alpha bool; cos and sin of the tokens' positions.

    Returns:
        [batch, seq, heads, head_dim]; what stands beyond a row's length is undefined.
    """
    if rows.form == "cpp":
        return cpp.take_in_chunk(query, new, rows, call, softmax_scale)
    rows.settle()
    layout = rows.layout
    settings = KernelSettings(softmax_scale, bias_channel=-1 if layout.clears_last_channel else None)
    window, seq = layout.local_window, query.shape[1]
    query = rotate(query, new.cos, new.sin)
    if layout.clears_last_channel:
        query[..., -1] = 0
    if not window:
        return _take_effect(query, new, rows, call, settings).out
    # The key's last channel is not cleared: the rotation must be undone, and the query's is zero.
    both = _with_ring(new._replace(key=rotate(new.key, new.cos, new.sin)), rows, call)
    # A query takes its own token's column. Any query fills the columns before; their outputs are not read.
    columns = both.key.shape[1]
    query = take(query, (torch.arange(columns, device=query.device) - call.held[:, None]).clamp(0, seq - 1))
    out, lse = flash_forward(query, BiasedKeys(both.key, both.value, None), replace(settings, window=window))
    if columns > window:
        # A query's token pushes out the token one window earlier.
        leaving = Tokens(*(x[:, : columns - window] for x in both))
        if layout.merges:  # merging happens before rotary embedding
            leaving = leaving._replace(key=unrotate(leaving.key, leaving.cos, leaving.sin))
        far = _take_effect(query[:, window:], leaving, rows, call, settings)
        out[:, window:] = join(Attended(out[:, window:], lse[:, window:]), far).out
    else:
        _make_room(rows, call, rows.kept)
    _write_ring(both, rows, call)
    return take(out, call.held[:, None] + torch.arange(seq, device=out.device))


def _with_ring(new: Tokens, rows: Rows, call: Chunk) -> Tokens:
    """What the rings hold, and ``new`` after it; keys rotated."""
    assert rows.decisions is not None
    heads, d = (rows.batch, rows.kv_heads), rows.head_dim
    place = call.place_before.repeat_interleave(rows.kv_heads, dim=0)
    held = rows.cells.read(rows.cells.places(place)).unflatten(0, heads).transpose(1, 2)
    decisions = rows.decisions.gather(1, place).unflatten(0, heads).transpose(1, 2)
    return Tokens(
        call.arrange(held[..., :d], new.key),
        call.arrange(held[..., d:], new.value),
        call.arrange(~decisions.signbit(), new.alpha),
        call.arrange(decisions.abs(), new.omega.to(decisions.dtype)),
        call.cos,
        call.sin,
    )


def _write_ring(both: Tokens, rows: Rows, call: Chunk) -> None:
    """The last columns become the rings' tokens."""
    assert rows.decisions is not None
    begun = call.tokens == 0
    alpha = both.alpha.clone()
    # A sequence's first token has nothing to merge into.
    alpha[:, 0] &= ~begun[:, None]
    decided = torch.where(alpha, both.omega, -both.omega)
    place = torch.arange(rows.layout.local_window, device=call.latest.device)
    exists = (place < (call.tokens + call.lengths)[:, None]).repeat_interleave(rows.kv_heads, dim=0)
    decided, key, value = (take(x, call.latest).transpose(1, 2).flatten(0, 1) for x in (decided, both.key, both.value))
    rows.decisions.copy_(decided.masked_fill(~exists, 0))
    slot = rows.cells.places(place.expand(len(exists), -1))
    slot = torch.where(exists, slot, rows.cells.nowhere)
    rows.cells.write(slot.flatten(), torch.cat([key, value], dim=-1).flatten(0, 1))


def _make_room(rows: Rows, call: Chunk, kept: Tensor) -> None:
    """For ``kept`` [rows] slots, or for the rings of those that keep none."""
    rows.cells.make_room(rows.lengths(kept, call.tokens + call.lengths))
    rows.kept = kept


def _take_effect(query: Tensor, new: Tokens, rows: Rows, call: Chunk, settings: KernelSettings) -> Attended:
    """Tokens that leave the ring become slots; query [batch, seq, heads, head_dim], one per token."""
    if rows.layout.merges:
        return _merge(query, new, rows, call, settings)
    return _keep(query, new, rows, call, settings)


def _merge(query: Tensor, new: Tokens, rows: Rows, call: Chunk, settings: KernelSettings) -> Attended:
    before = rows.kept.unflatten(0, (rows.batch, rows.kv_heads))
    real = (torch.arange(new.key.shape[1], device=before.device) < call.leaving[:, None])[..., None]
    alpha = torch.cat([(before > 0)[:, None] & new.alpha[:, :1], new.alpha[:, 1:]], dim=1)
    key, value, recent = _pooled(new, alpha, real, rows, call)
    key = rotate(key, new.cos[:, : key.shape[1]], new.sin[:, : key.shape[1]])
    if rows.layout.clears_last_channel:
        key[..., -1] = 0
    fade_logits = F.pad(hard_merge_logits(alpha[:, 1:].float()), (0, 0, 0, 1), value=float("-inf"))
    attended = diagonal_forward(query, FarKeys(*rows.held(key, value), fade_logits), settings)
    # An open slot that the first token merges into is among the pooled ones.
    attended = _with_past(query, settings, attended, rows, call, (before - alpha[:, 0].long()).flatten())

    appends = ~alpha & real
    ordinal = appends.cumsum(1) + before[:, None] - 1
    _make_room(rows, call, (ordinal[:, -1] + 1).flatten())
    # Token j's state is the slot's last one if token j + 1 appends or does not exist.
    last = real & ~F.pad(real[:, 1:] & alpha[:, 1:], (0, 0, 0, 1))
    _write(rows, last, ordinal, key, value)
    if recent is not None:
        slot = rows.cells.places(rows.layout.local_window + recent[0])
        rows.cells.write(slot.flatten(), recent[1].flatten(0, 1))
    return attended


def _pooled(
    new: Tokens, alpha: Tensor, real: Tensor, rows: Rows, call: Chunk
) -> tuple[Tensor, Tensor, tuple[Tensor, Tensor] | None]:
    """Every token's pooled key and value, while the open slots' state goes on; with a window_size also the last tokens,
    [rows, window_size, 2 * head_dim], after the place that each is to have among the reserved ones."""
    if rows.recent is not None:
        return _pooled_recent(new, alpha, rows, call)
    # A token past its row's length is merged with weight 0, which changes no sum.
    key, value, state = pool(
        new.key,
        new.value,
        (alpha | ~real).to(new.omega.dtype),
        new.omega * real,
        initial_state=rows.pool_state,
        return_final_state=True,
    )
    for held, after in zip(rows.pool_state, state, strict=True):
        held.copy_(after)
    return key, value, None


def _pooled_recent(new: Tokens, alpha: Tensor, rows: Rows, call: Chunk) -> tuple[Tensor, Tensor, tuple[Tensor, Tensor]]:
    """With a window_size: the last tokens are taken in again before the new ones."""
    assert rows.recent is not None
    size, window, d, heads = (
        rows.layout.recent,
        rows.layout.local_window,
        rows.head_dim,
        (rows.batch, rows.kv_heads),
    )
    # Tokens that had left the ring before; token p of them lies at p mod size.
    left = (call.tokens - window).clamp(min=0)
    place = (left[:, None] + torch.arange(size, device=left.device)) % size
    place = place.repeat_interleave(rows.kv_heads, dim=0)
    held = rows.cells.read(rows.cells.places(window + place)).unflatten(0, heads).transpose(1, 2)
    omega = rows.recent.gather(1, place).unflatten(0, heads).transpose(1, 2)
    key, value = torch.cat([held[..., :d], new.key], dim=1), torch.cat([held[..., d:], new.value], dim=1)
    alpha = torch.cat([torch.ones_like(omega, dtype=torch.bool), alpha], dim=1)
    omega = torch.cat([omega, new.omega.to(omega.dtype)], dim=1)
    pooled_key, pooled_value = pool(key, value, alpha.to(omega.dtype), omega, window_size=size)

    recent = call.leaving[:, None] + torch.arange(size, device=left.device)
    slot = (~alpha).cumsum(1)
    in_last_slot = take(slot, recent) == take(slot, recent[:, -1:])
    key, value, omega = take(key, recent), take(value, recent), take(omega, recent) * in_last_slot
    place = ((left + call.leaving)[:, None] + torch.arange(size, device=left.device)) % size
    place = place.repeat_interleave(rows.kv_heads, dim=0)
    rows.recent.scatter_(1, place, omega.transpose(1, 2).flatten(0, 1))
    tokens = torch.cat([key, value], dim=-1).transpose(1, 2).flatten(0, 1)
    return pooled_key[:, size:], pooled_value[:, size:], (place, tokens)


def _keep(query: Tensor, new: Tokens, rows: Rows, call: Chunk, settings: KernelSettings) -> Attended:
    """Evict and absorb. Keys are rotated."""
    before = rows.kept.unflatten(0, (rows.batch, rows.kv_heads))
    position = torch.arange(new.key.shape[1], device=before.device)
    first = (before == 0)[:, None] & (position == 0)[:, None]
    kept = ~new.alpha | first
    real = (position < call.leaving[:, None])[..., None]
    bias = torch.zeros(kept.shape, device=kept.device).masked_fill_(~kept, HIDDEN)
    attended = flash_forward(query, BiasedKeys(*rows.held(new.key, new.value), bias), settings)
    attended = _with_past(query, settings, attended, rows, call, rows.kept)
    if rows.layout.absorbs:
        after_each, state = residual(new.key, new.value, new.omega * (~kept & real), initial_state=rows.residual_state)
        for held, after in zip(rows.residual_state, state, strict=True):
            held.copy_(after)
        attended = join_one_key(query, attended, OneKey(*after_each), settings.softmax_scale)
    kept &= real
    ordinal = kept.cumsum(1) + before[:, None] - 1
    _make_room(rows, call, (ordinal[:, -1] + 1).flatten())
    _write(rows, kept, ordinal, new.key, new.value)
    if rows.layout.absorbs:
        state = rows.residual_state
        mean = torch.cat([state.key_sum, state.value_sum], dim=-1) / state.mass.clamp(min=LEAST_MASS)[..., None]
        place = torch.full_like(rows.kept, rows.layout.local_window)[:, None]
        rows.cells.write(rows.cells.places(place)[:, 0], mean.flatten(0, 1))
    return attended


def _write(rows: Rows, chosen: Tensor, ordinal: Tensor, key: Tensor, value: Tensor) -> None:
    """Tokens ``chosen``, bool [batch, seq, kv_heads], become the slots that ``ordinal`` counts."""
    if rows.form == "triton" and rows.layout.cache_dtype is None:
        return triton.write(rows, chosen, ordinal, key, value)
    sequence, position, head = chosen.nonzero(as_tuple=True)
    row = sequence * rows.kv_heads + head
    cells, layout = rows.cells, rows.layout
    slot = cells.at(row, layout.base + ordinal[sequence, position, head])
    cells.write(slot, torch.cat([x[sequence, position, head] for x in (key, value)], dim=-1))


def _with_past(
    query: Tensor, settings: KernelSettings, chunk: Attended, rows: Rows, call: Chunk, visible: Tensor
) -> Attended:
    """Joins a chunk's attention to itself with its attention to the first ``visible`` [rows] slots that were kept."""
    if not call.left_before:
        return chunk
    cells, d = rows.cells, rows.head_dim
    past = cells.dense().to(query.dtype)
    place = torch.arange(past.shape[1], device=visible.device)
    sees = (place >= rows.layout.base) & (place < (rows.layout.base + visible)[:, None])
    # Where a row has no page lies another's, and 0 * NaN is NaN.
    past = past.masked_fill_(~sees[..., None], 0).unflatten(0, (rows.batch, rows.kv_heads)).transpose(1, 2)
    bias = torch.zeros(sees.shape, device=sees.device).masked_fill_(~sees, HIDDEN)
    bias = bias.unflatten(0, (rows.batch, rows.kv_heads)).transpose(1, 2)
    keys = BiasedKeys(past[..., :d], past[..., d:], bias)
    return join(chunk, flash_forward(query, keys, replace(settings, causal=False)))
