"""One decoding step with a layer's cache on a CPU, as one call of compiled C++.

It takes the new token in and attends as the Triton kernels do, row after row and share after share of their lists, on torch's
number of threads. What operations of torch spend on the work between products is gone: a slot is read once, where it lies.
"""

import ctypes
import math

import torch
from torch import Tensor

from megatron_dmc.ops.decode.cpp_library import StepFields, library
from megatron_dmc.ops.decode.cpp_source import TYPES
from megatron_dmc.ops.decode.layout import Layout
from megatron_dmc.ops.decode.memory import Memory, OneToken
from megatron_dmc.ops.decode.rows import Rows
from megatron_dmc.ops.decode.triton_launch import fits
from megatron_dmc.ops.tokens import Tokens

NAME = "cpp"
DTYPES = (torch.float32, torch.bfloat16)
LARGEST_HEAD = 256
_CODES = dict(zip((torch.float32, torch.bfloat16, torch.int32, torch.int64), range(len(TYPES)), strict=True))


def unsupported(layout: Layout, key: Tensor) -> str | None:
    """Why a step of such a layout, with such keys [..., head_dim], cannot be one of this form; None: it can."""
    head_dim = key.shape[-1]
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


def step_in(memory: Memory, query: Tensor, new: Tokens, layout: Layout, call: OneToken, softmax_scale: float) -> Tensor:
    """:func:`step` for rows that lie anywhere."""
    batch, heads, head_dim = query.shape
    out = torch.empty(query.shape, dtype=memory.slots.dtype)
    given = {
        "query": query,
        "key": new.key,
        "value": new.value,
        "cos": call.cos,
        "sin": call.sin,
        "leaving_cos": call.leaving_cos,
        "leaving_sin": call.leaving_sin,
    }
    # They must live until the call is over.
    given = {name: _as_known(fits(x)) for name, x in given.items()}
    given |= {"omega": _as_known(new.omega), "tokens": call.tokens, "kept": memory.kept}
    fields = StepFields(
        slots=memory.slots.data_ptr(),
        hidden=_address(memory.hidden),
        out=out.data_ptr(),
        cells=memory.cells,
        pages=memory.table.shape[-1],
        page=layout.page_size,
        batch=batch,
        kv_heads=memory.kv_heads,
        group=heads // memory.kv_heads,
        head_dim=head_dim,
        window=layout.local_window,
        base=layout.base,
        window_size=layout.recent,
        merges=layout.merges,
        absorbs=layout.absorbs,
        clears_last=layout.clears_last_channel,
        cache_type=_CODES[out.dtype],
        threads=torch.get_num_threads(),
        scale=softmax_scale * math.log2(math.e),
    )
    for name, x in given.items():
        _give(fields, name, x)
        setattr(fields, f"{name}_type", _CODES[x.dtype])
    _give(fields, "alpha", new.alpha)
    if memory.place is not None:
        _give(fields, "place", memory.place)
        fields.place_type = _CODES[memory.place.dtype]
    for name in ("table", "sums", "decisions", "recent"):
        if (x := getattr(memory, name)) is not None:
            _give(fields, name, x)
    if (grants := memory.grants) is not None:
        fields.granted_place = _address(grants.place)
        fields.granted, fields.granted_count = grants.blocks.data_ptr(), grants.granted.data_ptr()
        fields.cursor, fields.overflow = grants.cursor.data_ptr(), grants.overflow.data_ptr()
        fields.granted_sequence, fields.granted_most = grants.blocks.stride(0), grants.blocks.shape[1]
        fields.count_sequence, fields.cells_per_block = grants.stride, grants.cells_per_block
    compiled = library()
    assert compiled is not None
    compiled.megatron_dmc_step(ctypes.byref(fields))
    return out


def _address(x: Tensor | None) -> int | None:
    return None if x is None else x.data_ptr()


def _as_known(x: Tensor) -> Tensor:
    return x if x.dtype in DTYPES else x.float()


def _give(fields: StepFields, name: str, x: Tensor) -> None:
    """Its address, and the strides of its sequences and heads."""
    setattr(fields, name, x.data_ptr())
    strides = x.stride()
    setattr(fields, f"{name}_sequence", strides[0])
    if len(strides) > 1:
        setattr(fields, f"{name}_head", strides[1])
