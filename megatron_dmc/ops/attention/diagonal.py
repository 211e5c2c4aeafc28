"""Causal attention to keys that fade from every query but their own: a flash kernel, and the diagonal put right.

The kernel gives every key j the bias log(1 - alpha_{j+1}), for its own query too. What the diagonal lacks,
exp(s_ii) = (1 - alpha_{i+1}) exp(s_ii) + alpha_{i+1} exp(s_ii), is one positive term per query, joined by its logarithm
u_i = log alpha_{i+1} + s_ii. Sums and weights are positive: nothing cancels. fade_logits_i is the logit of alpha_{i+1}.
"""

import torch
import torch.nn.functional as F
from torch import Tensor

from megatron_dmc.ops.attention.fading_keys import FarGradients, FarKeys
from megatron_dmc.ops.attention.flash import flash_backward, flash_forward
from megatron_dmc.ops.attention.one_key import OneKey, add_one_key_gradients, join_one_key
from megatron_dmc.ops.attention.types import Attended, KernelSettings


def diagonal_forward(query: Tensor, far: FarKeys, settings: KernelSettings) -> Attended:
    """Query i sees key j <= i with score softmax_scale q_i . k_j + [j < i] log(1 - sigmoid(fade_logits_j)).

    Args:
        query: [batch, seq, heads, head_dim].
        far: as long as the query; every key fades.
    """
    attended = flash_forward(query, far.biased(), settings)
    return join_one_key(query, attended, _missing(far), settings.softmax_scale)


def diagonal_backward(
    grad_out: Tensor, query: Tensor, far: FarKeys, final: Attended, settings: KernelSettings
) -> FarGradients:
    """The gradients, given the final result of a softmax that may have been joined with further terms."""
    d_query, d_key, d_value, d_bias = flash_backward(grad_out, query, far.biased(), final, settings)
    assert d_bias is not None and far.fade_logits is not None
    into = d_query, d_key, d_value
    d_missing = add_one_key_gradients(into, grad_out, query, _missing(far), final, settings.softmax_scale)
    # 1 - alpha as a sigmoid of its own: the difference has no digits left where alpha is near 1.
    d_fade = d_missing * torch.sigmoid(-far.fade_logits) - d_bias * torch.sigmoid(far.fade_logits)
    return FarGradients(d_query, d_key, d_value, d_fade)


def _missing(far: FarKeys) -> OneKey:
    """What the diagonal lacks: alpha_{i+1} times each query's own key."""
    assert far.fade_logits is not None
    return OneKey(far.key, far.value, F.logsigmoid(far.fade_logits))
