"""Which kernels decode, straight on the requests' headers, and which block size they ask for."""

from typing import Protocol

import torch
from torch import Tensor

from megatron_dmc.ops.decode import cpp, triton
from megatron_dmc.ops.decode.layout import Layout
from megatron_dmc.ops.decode.memory import Memory, OneToken
from megatron_dmc.ops.tokens import Tokens
from megatron_dmc.serving.header import Header


class Kernels(Protocol):
    """What triton.py and cpp.py of ops/decode both are."""

    NAME: str

    @staticmethod
    def unsupported(layout: Layout, key: Tensor) -> str | None: ...

    @staticmethod
    def step_in(
        memory: Memory, query: Tensor, new: Tokens, layout: Layout, call: OneToken, softmax_scale: float
    ) -> Tensor: ...


# By torch's devices.
OF_DEVICES: dict[str, Kernels] = {"cuda": triton, "cpu": cpp}
# Where a step without them would wait for the device several times in each layer: they are not left out for a block's size.
NEEDED = {"cuda"}
# Pages are small: every row fills one of its own, and half of it is lost. But a header has to fit into one block.
BLOCK_SIZES = (16, 32, 64, 128)


def of(header: Header, dtype: torch.dtype, device: str) -> Kernels | None:
    """Those that can decode models of such headers, if a header is one block.

    Args:
        dtype: of the cache.
        device: its type.
    """
    kernels = OF_DEVICES.get(device)
    key = torch.empty(0, header.head_dim, dtype=dtype, device="meta")
    return kernels if kernels and kernels.unsupported(header.layout, key) is None else None


def serve(header: Header, dtype: torch.dtype, device: str) -> bool:
    """Whether kernels decode: they find the state of a (layer, KV head) in one cell."""
    return of(header, dtype, device) is not None and header.blocks(dtype.itemsize) == 1
