"""Attention to keys that fade: exp(score) of key j counts 1 - sigmoid(fade_logits_j) times (DMS, arXiv 2506.05345)."""

from typing import NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor

from megatron_dmc.ops.attention.flash import HIDDEN, flash_backward, flash_forward
from megatron_dmc.ops.attention.types import Attended, BiasedKeys, KernelSettings


class FarKeys(NamedTuple):
    """Keys outside the local window.

    Attributes:
        key, value: [batch, seq_k, kv_heads, head_dim].
        fade_logits: [batch, seq_k, kv_heads] in float32 or wider; None: no key fades.
    """

    key: Tensor
    value: Tensor
    fade_logits: Tensor | None

    def biased(self) -> BiasedKeys:
        """With the bias log(1 - sigmoid(fade_logits)), which hides a key whose logit is infinite."""
        if self.fade_logits is None:
            return BiasedKeys(self.key, self.value, None)
        return BiasedKeys(self.key, self.value, F.logsigmoid(-self.fade_logits).clamp(min=HIDDEN))


class FarGradients(NamedTuple):
    """Of the query and of FarKeys, in their shapes."""

    query: Tensor
    key: Tensor
    value: Tensor
    fade_logits: Tensor | None


def fading_forward(query: Tensor, far: FarKeys, settings: KernelSettings) -> Attended:
    """Query i sees key j with score softmax_scale q_i . k_j + log(1 - sigmoid(fade_logits_j)).

    Args:
        query: [batch, seq_q, heads, head_dim].
    """
    return flash_forward(query, far.biased(), settings)


def fading_backward(
    grad_out: Tensor, query: Tensor, far: FarKeys, final: Attended, settings: KernelSettings
) -> FarGradients:
    """The gradients, given the final result of a softmax that may have been joined with further terms."""
    gradients = flash_backward(grad_out, query, far.biased(), final, settings)
    d_fade = None
    if far.fade_logits is not None and gradients.bias is not None:
        d_fade = -gradients.bias * torch.sigmoid(far.fade_logits)
    return FarGradients(gradients.query, gradients.key, gradients.value, d_fade)
