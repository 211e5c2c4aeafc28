"""Attention over all intermediate states of all slots (paper, section 3.2), with an optional window of raw keys."""

from megatron_dmc.ops.attention.api import causal_attention, dmc_attention, windowed_dmc_attention
from megatron_dmc.ops.attention.documents import Documents

__all__ = ["Documents", "causal_attention", "dmc_attention", "windowed_dmc_attention"]
