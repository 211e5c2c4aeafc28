"""The norm of queries and keys (Henry et al., arXiv 2010.04245, as RMSNorm), before rotary embedding."""

import torch.nn.functional as F
from torch import Tensor


def head_norm(x: Tensor, weight: Tensor, epsilon: float, last_channel: float = 1.0) -> Tensor:
    """RMSNorm over the channels of every head, of which the last one may count less.

    With s = ``last_channel``, D channels and x_D the last one:
    norm(x) = weight * x * rsqrt((x_1^2 + ... + x_{D-1}^2 + s^2 x_D^2) / (D - 1 + s^2) + epsilon).
    At s = 1 this is the base's norm. At s = 0 the last channel, which carries the decisions of the ``neuron`` source, has no
    say in what the others become. Between the two lies the phase zero_out.

    Args:
        x: [..., head_dim].
        weight: [head_dim].
        last_channel: s, 0 to 1.

    Returns:
        [..., head_dim], in x's dtype.
    """
    if last_channel == 1.0:
        return F.rms_norm(x, weight.shape, weight, epsilon)
    wide = x.double() if weight.itemsize == 8 else x.float()
    squares, share = wide.square(), last_channel**2
    total = squares[..., :-1].sum(-1, keepdim=True) + share * squares[..., -1:]
    scale = (total / (x.shape[-1] - 1 + share) + epsilon).rsqrt()
    return (wide * scale * weight).to(x.dtype)
