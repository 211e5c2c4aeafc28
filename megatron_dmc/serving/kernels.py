"""Which kernels decode, straight on the requests' headers, and which block size they ask for."""

from collections.abc import Callable
from typing import NamedTuple

import torch
from torch import Tensor

from megatron_dmc.ops.decode import cpp, triton
from megatron_dmc.ops.decode.layout import Layout
from megatron_dmc.ops.decode.memory import Memory
from megatron_dmc.ops.decode.sequences import ManyTokens
from megatron_dmc.ops.tokens import Tokens
from megatron_dmc.serving.header import Header


class Kernels(NamedTuple):
    """Functions of a module of ops/decode.

    Attributes:
        name: what ``Rows.form`` calls them.
        unsupported: why they cannot serve a layout and a key's dtype and size.
        step_in: takes in one token of each sequence, and fills ``out``.
        take_in: any number; None: chunk.py does, with copies of the rows.
    """

    name: str
    unsupported: Callable[[Layout, Tensor], str | None]
    step_in: Callable[..., Tensor]
    take_in: Callable[[Memory, Tensor, Tokens, Layout, ManyTokens, float], Tensor] | None = None


TRITON = Kernels("triton", triton.unsupported, triton.step_in)
CPP = Kernels("cpp", cpp.unsupported, cpp.step_in, cpp.take_in)
# By torch's devices.
OF_DEVICES: dict[str, Kernels] = {"cuda": TRITON, "cpu": CPP}
# Where a step without them would wait for the device several times in each layer: they are not left out for a block's size.
NEEDED = {"cuda"}
# Pages are small: every row fills one of its own, and half of it is lost. But a header has to fit into one block.
BLOCK_SIZES = (16, 32, 64, 128)


def of(header: Header, device: str) -> Kernels | None:
    """Those that can decode models of such headers, if a header is one block; device: its type."""
    kernels = OF_DEVICES.get(device)
    key = torch.empty(0, header.head_dim, dtype=header.dtype, device="cpu" if device == "cpu" else "meta")
    return kernels if kernels and kernels.unsupported(header.layout, key) is None else None


def serve(header: Header, device: str) -> bool:
    """Whether kernels decode: they find the state of a (layer, KV head) in one cell."""
    return of(header, device) is not None and header.blocks == 1
