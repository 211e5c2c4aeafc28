"""One decoding step with a layer's cache on a CPU, as one call of compiled C++.

It takes the new token in and attends as the Triton kernels do, row after row and share after share of their lists, on torch's
number of threads. What operations of torch spend on the work between products is gone: a slot is read once, where it lies.
"""

import ctypes
import math
from typing import Any

import torch
from torch import Tensor

from megatron_dmc.ops.decode.cpp_library import StepFields, library
from megatron_dmc.ops.decode.cpp_source import HELD, TYPES
from megatron_dmc.ops.decode.layout import Layout
from megatron_dmc.ops.decode.memory import Memory, OneToken, fits
from megatron_dmc.ops.decode.rows import Rows
from megatron_dmc.ops.decode.sequences import Chunk, ManyTokens
from megatron_dmc.ops.tokens import Tokens

DTYPES = (torch.float32, torch.bfloat16)
LARGEST_HEAD = 256
# What slots are, in the order of cpp_codes.py.
_CACHE_DTYPES = (None, "int8", "int4", "fp8")
_CODES = dict(zip((torch.float32, torch.bfloat16, torch.int32, torch.int64), range(len(TYPES)), strict=True))


def unsupported(layout: Layout, key: Tensor) -> str | None:
    """Why a step of such a layout, with such keys [..., head_dim], cannot be one of this form; None: it can."""
    head_dim = key.shape[-1]
    if key.device.type != "cpu":
        return f"keys are on {key.device}"
    if key.dtype not in DTYPES:
        return f"keys are {key.dtype}"
    if head_dim % 2 or head_dim > LARGEST_HEAD:
        return f"head_dim is {head_dim}"
    if not layout.merges and not layout.local_window:
        return f"{layout.operation} needs a local window"
    if library() is None:
        return "no C++ could be compiled"
    return None


def step(query: Tensor, new: Tokens, rows: Rows, call: OneToken, softmax_scale: float) -> Tensor:
    """As triton.py's."""
    return step_in(Memory.of(rows), query, new, rows.layout, call, softmax_scale)


@torch.compiler.disable
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
    """:func:`step` for rows that lie anywhere; out: a contiguous tensor of the cache's dtype that is to be filled."""
    told = Told(memory, query, new, layout, call, softmax_scale, out=out)
    return told.run(_compiled().megatron_dmc_step)


@torch.compiler.disable
def take_in_chunk(query: Tensor, new: Tokens, rows: Rows, call: Chunk, softmax_scale: float) -> Tensor:
    """As chunk.py's."""
    batch, seq = query.shape[:2]
    rows.settle()
    query, key, value, alpha, omega = (x.flatten(0, 1) for x in (query, new.key, new.value, new.alpha, new.omega))
    flat = Tokens(key, value, alpha, omega, call.many.cos, call.many.sin)
    told = Told(Memory.of(rows), query, flat, rows.layout, call.many, softmax_scale)
    kept = torch.empty_like(rows.kept)
    _compiled().megatron_dmc_kept_after(ctypes.byref(told.fields), kept.data_ptr())
    rows.cells.make_room(rows.lengths(kept, call.tokens + call.lengths))
    told.point_to(Memory.of(rows))
    return told.run(_compiled().megatron_dmc_take_in).unflatten(0, (batch, seq))


@torch.compiler.disable
def take_in(
    memory: Memory, query: Tensor, new: Tokens, layout: Layout, call: ManyTokens, softmax_scale: float
) -> Tensor:
    """The next tokens of every sequence, for rows that lie anywhere and take their cells themselves.

    Args:
        query: [n, heads, head_dim], one sequence's tokens after another's, before rotary embedding.
        new: [n, kv_heads, ...], the key before rotary embedding; its cos and sin are not read.

    Returns:
        [n, heads, head_dim] in the cache's dtype; what is no sequence's token is zero.
    """
    return Told(memory, query, new, layout, call, softmax_scale).run(_compiled().megatron_dmc_take_in)


class Told:
    """What the compiled code is told, and the tensors that must live until it is done."""

    def __init__(
        self,
        memory: Memory,
        query: Tensor,
        new: Tokens,
        layout: Layout,
        call: OneToken | ManyTokens,
        softmax_scale: float,
        *,
        out: Tensor | None = None,
    ):
        self.out = torch.zeros(query.shape, dtype=memory.dtype) if out is None else out
        self.given = {"query": query, "key": new.key, "value": new.value, "omega": new.omega}
        self.given |= {name: getattr(call, name) for name in ("cos", "sin", "leaving_cos", "leaving_sin")}
        self.given = {name: _as_known(fits(x)) for name, x in self.given.items()}
        self.given["tokens"] = call.tokens
        fields = self.fields = StepFields(
            out=self.out.data_ptr(),
            page=layout.page_size,
            batch=len(call.tokens),
            kv_heads=memory.kv_heads,
            group=query.shape[1] // memory.kv_heads,
            head_dim=query.shape[2],
            window=layout.local_window,
            base=layout.base,
            window_size=layout.recent,
            merges=layout.merges,
            absorbs=layout.absorbs,
            clears_last=layout.clears_last_channel,
            cache_type=_CODES[self.out.dtype],
            threads=torch.get_num_threads(),
            scale=softmax_scale * math.log2(math.e),
        )
        if (codes := memory.codes) is not None:
            fields.code = _CACHE_DTYPES.index(codes.cache_dtype)
            fields.code_group, fields.slot_bytes = codes.group, codes.slot_bytes
        if (near := memory.near_cells) is not None:
            fields.near_cells, fields.near_per_cell = near.cells, near.per_cell
        for name, x in self.given.items():
            self._give_typed(name, x)
        self._give("alpha", new.alpha)
        self.point_to(memory)
        if isinstance(call, ManyTokens):
            self.spans = call.starts.contiguous(), call.counts.contiguous()
            fields.starts, fields.counts = (x.data_ptr() for x in self.spans)

    def point_to(self, memory: Memory) -> None:
        """Where the rows lie; they may have moved when room was made."""
        fields, self.memory = self.fields, memory
        fields.slots = memory.slots.data_ptr()
        fields.cells, fields.pages = memory.cells, memory.table.shape[-1]
        self._give_typed("kept", memory.kept)
        if memory.place is not None:
            self._give_typed("place", memory.place)
        for name in HELD:
            if (held := getattr(memory, name)) is not None:
                self._give(name, held)
        if (grants := memory.grants) is not None:
            fields.granted_place = _address(grants.place)
            fields.granted, fields.granted_count = grants.blocks.data_ptr(), grants.granted.data_ptr()
            fields.cursor, fields.overflow = grants.cursor.data_ptr(), grants.overflow.data_ptr()
            fields.granted_sequence, fields.granted_most = grants.blocks.stride(0), grants.blocks.shape[1]
            fields.count_sequence, fields.cells_per_block = grants.stride, grants.cells_per_block

    def run(self, function: Any) -> Tensor:
        function(ctypes.byref(self.fields))
        return self.out

    def _give_typed(self, name: str, x: Tensor) -> None:
        self._give(name, x)
        setattr(self.fields, f"{name}_type", _CODES[x.dtype])

    def _give(self, name: str, x: Tensor) -> None:
        """Its address, and the strides of its sequences, or tokens, and heads."""
        setattr(self.fields, name, x.data_ptr())
        strides = x.stride()
        setattr(self.fields, f"{name}_sequence", strides[0])
        if len(strides) > 1:
            setattr(self.fields, f"{name}_head", strides[1])


def _compiled() -> ctypes.CDLL:
    compiled = library()
    assert compiled is not None
    return compiled


def _address(x: Tensor | None) -> int | None:
    return None if x is None else x.data_ptr()


def _as_known(x: Tensor) -> Tensor:
    """As memory holds it, not as a view that is negated or zero only when it is read."""
    x = x if x.dtype in DTYPES else x.float()
    return x.clone() if x.is_neg() or x._is_zerotensor() else x
