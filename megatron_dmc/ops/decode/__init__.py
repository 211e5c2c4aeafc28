"""Inference with the compressed cache (paper, section 3.1): prefill, chunked prefill and decode are one call."""

from megatron_dmc.ops.decode.layer_cache import LayerCache

__all__ = ["LayerCache"]
