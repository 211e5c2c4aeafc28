"""RMSNorm that works under sequence parallelism (megatron-core's torch norm refuses it)."""

from typing import Any

import torch
from torch import Tensor


class RMSNorm(torch.nn.RMSNorm):
    """torch's RMSNorm. megatron-core sums its weight's gradient over the sequence-parallel ranks."""

    def __init__(self, config: Any, hidden_size: int, eps: float = 1e-5) -> None:
        super().__init__(hidden_size, eps=eps, dtype=config.params_dtype)
        # megatron-core reads this attribute when it finalizes gradients.
        setattr(self.weight, "sequence_parallel", config.sequence_parallel)  # noqa: B010 (no attribute of Parameter)

    def forward(self, x: Tensor) -> Tensor:
        return super().forward(x)
