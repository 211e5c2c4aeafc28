"""The linear map that the ``projection`` decisions are read from, as a megatron-core module."""

from typing import Any

import torch
import torch.distributed as dist
from megatron.core.tensor_parallel import ColumnParallelLinear
from megatron.core.transformer.transformer_config import TransformerConfig
from torch import Tensor


class DecisionProjection(ColumnParallelLinear):
    """U D h + beta, rows (a_0, b_0, a_1, b_1, ...) of the KV heads; zero at first.

    D is diagonal and fixed: 1, or what :meth:`set_input_scale` makes it. megatron-core's own linear layer, under Transformer
    Engine too: decisions are never computed in FP8.

    Attributes:
        input_scale: the diagonal of D, [hidden]; powers of two, so that U D is exact in every dtype.
        offset: added to the logits a of all heads, and the same in all layers, [1]; float32 in a model of any dtype. What
            keeps the ratio at its target moves it.
    """

    input_scale: Tensor
    offset: Tensor

    def __init__(self, config: TransformerConfig, tp_group: dist.ProcessGroup) -> None:
        super().__init__(
            config.hidden_size,
            2 * config.num_query_groups,
            config=config,
            init_method=torch.nn.init.zeros_,
            bias=True,
            gather_output=False,
            skip_bias_add=False,
            tp_group=tp_group,
        )
        self.register_buffer("input_scale", torch.ones_like(self.weight[0], requires_grad=False))
        self.register_buffer("offset", torch.zeros(1, device=self.weight.device))

    def _apply(self, fn: Any, *arguments: Any, **settings: Any) -> Any:
        """As torch's, which converts a model; the offset moves by less than bfloat16 can hold."""
        module = super()._apply(fn, *arguments, **settings)
        self.offset = self.offset.float()
        return module

    def forward(self, input_: Tensor, *arguments: Any, **settings: Any) -> Any:
        # U D, not D h: that would be kept for the backward pass, as large as the hidden states.
        return super().forward(input_, self.weight * self.input_scale, *arguments, **settings)

    @property
    def effective_weight(self) -> Tensor:
        """U D: the map of h itself, as an exported model has it. [rows, hidden]"""
        return self.weight.detach() * self.input_scale

    def effective_bias(self, scale: float) -> Tensor:
        """beta with the offset in it, as an exported model has it; ``scale``: dmc.decision_scale. [rows]"""
        bias = self.bias.detach().float()
        bias[0::2] += self.offset / scale
        return bias

    @torch.no_grad()
    def set_input_scale(self, mean_square: Tensor) -> None:
        """Lets learning rates count in logits: Adam moves every element of U by the learning rate, and so a logit by at most
        rate x the sum of |D h|, which this makes about 1 whatever the width and whichever channels stand out.

        Keeps U D as it is.

        Args:
            mean_square: of every channel of h, [hidden], > 0.
        """
        # A channel that is always 0 is not scaled beyond all others.
        root = mean_square.double().clamp(min=float(1e-6 * mean_square.mean())).sqrt()
        scale = (root * root.numel()).reciprocal().log2().round().exp2()
        weight = self.effective_weight
        self.input_scale.copy_(scale)
        self.weight.copy_(weight / self.input_scale)


def is_buffer(name: str) -> bool:
    """Whether a checkpoint's tensor is a projection's ``input_scale`` or ``offset``; older ones have neither: 1 and 0."""
    return name.endswith(("decision.input_scale", "decision.offset"))
