"""Counter-based noise of the merge decisions."""

from megatron_dmc.ops.noise.api import logistic_noise

__all__ = ["logistic_noise"]
