"""Inference with the compressed cache (paper, section 3.1): prefill, chunked prefill and decode are one call."""

from megatron_dmc.ops.decode.layer_cache import LayerCache
from megatron_dmc.ops.decode.sequences import Sequences
from megatron_dmc.ops.decode.state import bytes_of

__all__ = ["LayerCache", "Sequences", "bytes_of"]
