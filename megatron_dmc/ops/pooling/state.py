"""What pooling carries from one chunk of tokens to the next."""

from typing import NamedTuple

from torch import Tensor


class PoolState(NamedTuple):
    """The running sums of the open slot: N_k, N_v [batch, kv_heads, head_dim] and z [batch, kv_heads]; float32 or wider."""

    key_sum: Tensor
    value_sum: Tensor
    weight: Tensor
