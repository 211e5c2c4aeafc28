"""One decoding step with a layer's cache as three Triton kernels, and what a chunk of a prompt leaves as one.

A step reads nothing back, allocates its output and a small workspace only, and needs no length on the host: it can be captured
in a CUDA graph. How its kernels are made (numbers are sizes and counts; no time was measured):

- *advance*, a program of one warp per row: the new token, its decision, the sums. It moves about a kilobyte per row; what it
  costs is its chain of dependent loads (count, table, slot), so it issues all loads before its first store.
- *attend*, a program per row and share of its list. All query heads of a KV head are in one program, so that a slot is read
  once, and the tensor cores take them as the 16 rows that they need anyway. The query is rotated in every share, which is
  cheaper than a launch. A page of 16 slots is 8 KB in one piece at head_dim 128 in bf16, keys and values side by side.
  A list is shared out on the device: each of a row's programs takes its part of what there is, and those of a short row that
  have nothing to do return at once. So a captured graph keeps its balance while the lists grow. With 8 rows of 8192 slots on
  132 processors 512 programs have work. Two blocks of 32 KB are under way in each, and three programs fit on a processor of an
  H100: more bytes in flight than bandwidth times latency asks for.
- *join*: the shares by their log-sum-exps, a program per query head. Lists that fit into one share need none.

Pages may hold codes, float8_e4m3fn: *advance* makes them and *attend* reads them by their bits, in a few operations of whole
numbers per code, since the conversion in hardware begins with compute capability 8.9. The ring is read as it lies.

Visibility follows from the counts: of the ring what has been written, of the reserved places the residual slot if it holds
something, of the rest what is kept.
"""

import functools
import math

import torch
from torch import Tensor

from megatron_dmc.ops.decode import triton_kernels
from megatron_dmc.ops.decode.layout import Layout
from megatron_dmc.ops.decode.memory import Memory, OneToken, fits
from megatron_dmc.ops.decode.rows import Rows
from megatron_dmc.ops.decode.triton_launch import AVAILABLE, Launch, power_of_two
from megatron_dmc.ops.tokens import Tokens

DTYPES = (torch.bfloat16, torch.float16, torch.float32)
LARGEST_HEAD = 256
# Programs of attend for each processor of the GPU, where a batch is small.
PER_PROCESSOR = 4
# Where it is large: a row much longer than the others must not be one program that all wait for.
FEWEST_SPLITS, MOST_SPLITS = 4, 128
# Slots below which a list is not shared out further.
LEAST_SHARE = 128
# Bytes of slots that an iteration of attend reads at most.
BLOCK_BYTES = 32 * 1024
# Tokens that a program of write looks at.
WRITTEN_BLOCK = 32


def unsupported(layout: Layout, key: Tensor) -> str | None:
    """Why a step of such a layout, with such keys [..., head_dim], cannot be one of this form; None: it can."""
    head_dim = key.shape[-1]
    if layout.cache_dtype not in (None, "fp8"):
        return f"cache_dtype is {layout.cache_dtype}"
    if not AVAILABLE:
        return "Triton is not installed"
    if key.dtype not in DTYPES:
        return f"keys are {key.dtype}"
    if head_dim % 2 or head_dim > LARGEST_HEAD:
        return f"head_dim is {head_dim}"
    if layout.recent:
        return f"window_size is {layout.window_size}"
    if not layout.merges and not layout.local_window:
        return f"{layout.operation} needs a local window"
    return None


def step(query: Tensor, new: Tokens, rows: Rows, call: OneToken, softmax_scale: float) -> Tensor:
    """Takes one token of every sequence into its rows, and lets its query see them.

    ``rows.kept`` is brought up to date. ``rows.ahead`` is not read.

    Args:
        query: [batch, heads, head_dim], before rotary embedding.
        new: [batch, kv_heads, ...], the key before rotary embedding; its cos and sin are not read.

    Returns:
        [batch, heads, head_dim] in query's dtype.
    """
    return step_in(Memory.of(rows), query, new, rows.layout, call, softmax_scale)


def step_in(
    memory: Memory,
    query: Tensor,
    new: Tokens,
    layout: Layout,
    call: OneToken,
    softmax_scale: float,
    *,
    out: Tensor | None = None,
) -> Tensor:
    """:func:`step` for rows that lie anywhere; out: a contiguous tensor that is to be filled."""
    length, advances = advance(memory, new, layout, call)
    out, attends = attend(memory, query, length, layout, call, softmax_scale, out=out)
    for launch in (advances, *attends):
        launch.run()
    return out


def write(rows: Rows, chosen: Tensor, ordinal: Tensor, key: Tensor, value: Tensor) -> None:
    """Tokens ``chosen`` become the slots that ``ordinal`` counts.

    Args:
        chosen: bool [batch, seq, kv_heads]; the rows have cells for all of them.
        ordinal: int64 [batch, seq, kv_heads], from 0.
        key, value: [batch, seq, kv_heads, head_dim], the key rotated.
    """
    write_in(Memory.of(rows), rows.layout, chosen, ordinal, key, value).run()


def write_in(memory: Memory, layout: Layout, chosen: Tensor, ordinal: Tensor, key: Tensor, value: Tensor) -> Launch:
    """:func:`write` for rows that lie anywhere, as a launch."""
    batch, seq, kv_heads = chosen.shape
    key, value = fits(key), fits(value)
    arguments = {
        "chosen": chosen.contiguous().view(torch.uint8),
        "ordinal": ordinal.contiguous(),
        "key": key,
        "value": value,
        "seq": seq,
        "BASE": layout.base,
        "BLOCK": WRITTEN_BLOCK,
        "D_PADDED": power_of_two(memory.head_dim, 16),
        **_placed(memory, layout),
        **_strides("table", memory.table),
        "pages": memory.table.shape[-1],
    }
    for name, x in (("key", key), ("value", value)):
        arguments |= {f"{name}_{part}": x.stride(i) for i, part in enumerate(("sequence", "token", "head"))}
    return Launch(triton_kernels.write, (batch * kv_heads, -(-seq // WRITTEN_BLOCK)), arguments, warps=4)


def advance(memory: Memory, new: Tokens, layout: Layout, call: OneToken) -> tuple[Tensor, Launch]:
    """The token that leaves the ring, or the new one where there is no ring, takes effect.

    Its slot is written as attention sees it: rotated. An open slot is thus written again at every token that it takes. With
    ``memory.grants`` a row whose list grows into a new page takes a cell for it.

    Returns:
        int32 [batch * kv_heads], the lengths of the rows' lists once the launch has run; and the launch.
    """
    if layout.recent:
        raise ValueError(f"a step in Triton knows no window_size, got {layout.window_size}")
    batch, kv_heads, head_dim = new.key.shape
    key, value = fits(new.key), fits(new.value)
    length = torch.empty(batch * kv_heads, dtype=torch.int32, device=key.device)
    cos, sin = _alike(call.cos, call.sin)
    leaving_cos, leaving_sin = _alike(call.leaving_cos, call.leaving_sin)
    grants = memory.grants
    arguments = {
        "key": key,
        "value": value,
        "alpha": new.alpha.view(torch.uint8),
        "omega": new.omega,
        "cos": cos,
        "sin": sin,
        "leaving_cos": leaving_cos,
        "leaving_sin": leaving_sin,
        "tokens": call.tokens,
        "kept": memory.kept,
        "sums": memory.sums,
        "decisions": memory.decisions,
        "granted_place": None if grants is None else grants.place,
        "granted": None if grants is None else grants.blocks,
        "granted_count": None if grants is None else grants.granted,
        "cursor": None if grants is None else grants.cursor,
        "overflow": None if grants is None else grants.overflow,
        "granted_sequence": 0 if grants is None else grants.blocks.stride(0),
        "granted_most": 0 if grants is None else grants.blocks.shape[1],
        "count_sequence": 0 if grants is None else grants.stride,
        "length": length,
        "cos_sequence": cos.stride(0),
        "leaving_sequence": leaving_cos.stride(0),
        "pages": memory.table.shape[-1],
        **_placed(memory, layout),
        **_near(memory, layout),
        "NEAR_PAGES_PADDED": power_of_two(0 if memory.near_cells is None else memory.near_cells.cells),
        "LANES": power_of_two(head_dim // 2),
        "WINDOW": layout.local_window,
        "MERGES": layout.merges,
        "ABSORBS": layout.absorbs,
        "CLEARS_LAST": layout.clears_last_channel,
        "CELLS_PER_BLOCK": 1 if grants is None else grants.cells_per_block,
    }
    for name, x in (("key", key), ("value", value), ("alpha", new.alpha), ("omega", new.omega)):
        arguments |= _strides(name, x)
    for name, held in (("table", memory.table), ("kept", memory.kept), ("sums", memory.sums)):
        arguments |= _strides(name, held)
    arguments |= _strides("decisions", memory.decisions)
    return length, Launch(triton_kernels.advance, (batch, kv_heads), arguments, warps=1)


def attend(
    memory: Memory,
    query: Tensor,
    length: Tensor,
    layout: Layout,
    call: OneToken,
    softmax_scale: float,
    *,
    out: Tensor | None = None,
    splits: int | None = None,
    least_share: int = LEAST_SHARE,
) -> tuple[Tensor, list[Launch]]:
    """One query per head over its row's list.

    Args:
        query: [batch, heads, head_dim], before rotary embedding.
        length: int32 [batch * kv_heads], of the lists.
        out: a contiguous tensor that is to be filled, as what is returned; None: a new one.
        splits: shares of a list at most, a power of two; None: as many as the device can use.
        least_share: slots of a share at least.

    Returns:
        [batch, heads, head_dim] in query's dtype, undefined until the launches have run one after another; and these.
    """
    batch, heads, head_dim = query.shape
    rows, group = batch * memory.kv_heads, heads // memory.kv_heads
    query = fits(query)
    cos, sin = _alike(call.cos, call.sin)
    if splits is None:
        capacity = memory.table.shape[-1] * layout.page_size + (layout.base if memory.codes is not None else 0)
        splits = splits_for(rows, capacity, _processors(query.device))
    block = block_for(head_dim, memory.dtype.itemsize)
    if out is None:
        out = torch.empty(query.shape, dtype=query.dtype, device=query.device)
    part = weight = None
    if splits > 1:
        part = query.new_empty(rows, splits, group, head_dim, dtype=torch.float32)
        weight = part.new_empty(part.shape[:-1])
    sizes: dict[str, int] = {
        "GROUP": group,
        "D": head_dim,
        "D_PADDED": power_of_two(head_dim, 16),
        "BLOCK": block,
        "LEAST": max(least_share // block, 1) * block,
        "SPLITS": splits,
    }
    results = {"length": length, "out": out, "part": part, "weight": weight}
    sums = memory.sums if layout.absorbs else None
    arguments = {
        "query": query,
        "cos": cos,
        "sin": sin,
        "sums": sums,
        "cos_sequence": cos.stride(0),
        "scale": softmax_scale * math.log2(math.e),
        **_strides("query", query),
        **_strides("table", memory.table),
        **_strides("sums", sums),
        **results,
        **_placed(memory, layout),
        **_near(memory, layout),
        **sizes,
        "GROUP_PADDED": power_of_two(group, 16),
        "WINDOW": layout.local_window,
        "BASE": layout.base,
        "CLEARS_LAST": layout.clears_last_channel,
    }
    # The table is read an iteration before the slots that it names: with 3 stages one block of slots is under way, with 5 two.
    # A large group's accumulators leave no room for two.
    stages = 5 if group <= 16 else 3
    warps = 8 if group > 32 else 4
    launches = [Launch(triton_kernels.attend, (rows, splits), arguments, warps=warps, stages=stages)]
    if splits > 1:
        launches.append(Launch(triton_kernels.join, (rows, group), results | sizes, warps=4))
    return out, launches


def splits_for(rows: int, capacity: int, processors: int) -> int:
    """Shares of a list: of a few powers of two, since every number of them is compiled on its own.

    Args:
        rows: of the call.
        capacity: slots that a list has at most.
        processors: of the GPU.
    """
    if capacity <= LEAST_SHARE:
        return 1
    wanted = min(max(PER_PROCESSOR * processors // rows, FEWEST_SPLITS), MOST_SPLITS)
    return 1 << (wanted.bit_length() - 1)


def block_for(head_dim: int, element_size: int) -> int:
    """Slots that an iteration of attend takes: 64, or fewer where they are large."""
    bytes_of_slot = 2 * power_of_two(head_dim, 16) * element_size
    # float32 has no tensor cores here: its products are made in registers, and there are not so many.
    most = BLOCK_BYTES if element_size == 2 else BLOCK_BYTES // 2
    return max(min(64, most // bytes_of_slot), 16)


def _placed(memory: Memory, layout: Layout) -> dict[str, object]:
    return {
        "slots": memory.slots,
        "cells": memory.cells,
        "place": memory.place,
        "table": memory.table,
        "HEADS": memory.kv_heads,
        "D": memory.head_dim,
        "PAGE": layout.page_size,
    }


def _near(memory: Memory, layout: Layout) -> dict[str, object]:
    """Where the ring and the reserved places are: in pages like all others; or in the first ones of codes; or beside them."""
    if memory.codes is None:
        pages, page, stride, near = 0, layout.page_size, layout.page_size * 2 * memory.head_dim, memory.slots
    elif (cells := memory.near_cells) is not None:
        near = memory.slots.flatten().view(cells.dtype)
        pages, page, stride = (
            cells.cells,
            cells.per_cell,
            layout.page_size * memory.codes.slot_bytes // cells.dtype.itemsize,
        )
    else:
        assert memory.near is not None
        pages, page, stride, near = 0, 1, 0, memory.near
    return {
        "near": near,
        **_strides("near", memory.near),
        "CODED": memory.codes is not None,
        "NEAR_PAGES": pages,
        "NEAR_PAGE": page,
        "NEAR_STRIDE": stride,
    }


def _strides(name: str, x: Tensor | None) -> dict[str, int]:
    """Of its sequences and heads."""
    return {f"{name}_{part}": 0 if x is None else x.stride(i) for i, part in enumerate(("sequence", "head"))}


def _alike(cos: Tensor, sin: Tensor) -> tuple[Tensor, Tensor]:
    """With the same strides, the last one 1."""
    cos, sin = fits(cos), fits(sin)
    return (cos, sin) if cos.stride() == sin.stride() else (cos.contiguous(), sin.contiguous())


@functools.cache
def _processors(device: torch.device) -> int:
    if device.type != "cuda":
        return 1
    return int(torch.cuda.get_device_properties(device).multi_processor_count)
