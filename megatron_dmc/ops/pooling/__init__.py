"""Merging of keys and values into slots, before rotary embedding (paper, section 3.1)."""

from megatron_dmc.ops.pooling.api import PoolState, pool

__all__ = ["PoolState", "pool"]
