"""RMSNorm: of the residual stream, and of the heads of queries and keys."""

from typing import Any

import torch
from torch import Tensor

from megatron_dmc.ops.head_norm import head_norm


class RMSNorm(torch.nn.RMSNorm):
    """torch's RMSNorm, also under sequence parallelism, which megatron-core's torch norm refuses.

    megatron-core sums its weight's gradient over the sequence-parallel ranks.
    """

    def __init__(self, config: Any, hidden_size: int, eps: float = 1e-5) -> None:
        super().__init__(hidden_size, eps=eps, dtype=config.params_dtype)
        # megatron-core reads this attribute when it finalizes gradients.
        setattr(self.weight, "sequence_parallel", config.sequence_parallel)  # noqa: B010 (no attribute of Parameter)

    def forward(self, x: Tensor) -> Tensor:
        return super().forward(x)


class HeadNorm(torch.nn.Module):
    """The norm of queries or keys over their channels, in a place of its own: decisions are read before it.

    megatron-core calls its ``q_layernorm`` and ``k_layernorm`` where it makes queries and keys; there this one lets them pass.
    DMCSelfAttention calls :meth:`norm`. megatron-core sums the weight's gradient over the tensor-parallel ranks, by its name.
    """

    def __init__(self, hidden_size: int, config: Any, eps: float) -> None:
        super().__init__()
        self.weight = torch.nn.Parameter(torch.ones(hidden_size, dtype=config.params_dtype))
        self.eps = eps

    def forward(self, x: Tensor) -> Tensor:
        return x

    def norm(self, x: Tensor, last_channel: float = 1.0) -> Tensor:
        """See :func:`head_norm`."""
        return head_norm(x, self.weight, self.eps, last_channel)
