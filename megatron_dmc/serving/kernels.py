"""Where decode's Triton kernels serve, straight on the requests' headers, and which block size they ask for."""

import torch

from megatron_dmc.ops.decode import triton
from megatron_dmc.serving.header import Header

# Of torch's devices. On a CPU there is only Triton's interpreter, which tests use.
DEVICES = {"cuda"}
# Pages are small: every row fills one of its own, and half of it is lost. But a header has to fit into one block.
BLOCK_SIZES = (16, 32, 64, 128)


def can_serve(header: Header, dtype: torch.dtype, device: str) -> bool:
    """Whether kernels can decode models of such headers, if a header is one block.

    Args:
        dtype: of the cache.
        device: its type.
    """
    key = torch.empty(0, header.head_dim, dtype=dtype, device="meta")
    return device in DEVICES and triton.unsupported(header.layout, key) is None


def serve(header: Header, dtype: torch.dtype, device: str) -> bool:
    """Whether kernels decode: they find the state of a (layer, KV head) in one cell."""
    return can_serve(header, dtype, device) and header.blocks(dtype.itemsize) == 1
