"""What the residual slot gives to every token, and what it carries from one chunk of tokens to the next."""

from typing import NamedTuple

from torch import Tensor


class Residual(NamedTuple):
    """The residual slot as it is after each token.

    Attributes:
        mean_key, mean_value: [batch, seq, kv_heads, head_dim]; 0 where the slot holds nothing.
        log_mass: log N, [batch, seq, kv_heads] in float32 or wider; -inf where the slot holds nothing.
    """

    mean_key: Tensor
    mean_value: Tensor
    log_mass: Tensor


class ResidualState(NamedTuple):
    """The running sums: N_k, N_v [batch, kv_heads, head_dim] and N [batch, kv_heads]; float32 or wider."""

    key_sum: Tensor
    value_sum: Tensor
    mass: Tensor
