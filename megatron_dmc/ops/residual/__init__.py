"""The residual slot: a running weighted mean of all tokens that were absorbed (algorithm.md, section 7.3)."""

from megatron_dmc.ops.residual.api import residual
from megatron_dmc.ops.residual.types import Residual, ResidualState

__all__ = ["Residual", "ResidualState", "residual"]
