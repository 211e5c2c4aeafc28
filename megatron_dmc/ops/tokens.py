"""Tokens on their way into attention or into the cache."""

from typing import NamedTuple

from torch import Tensor


class Tokens(NamedTuple):
    """Keys and values with what is needed to merge and rotate them.

    Attributes:
        key, value: [batch, seq, kv_heads, head_dim]. Each user says whether the key is rotated.
        alpha: [batch, seq, kv_heads], in [0, 1] in training, bool in the cache.
        omega: [batch, seq, kv_heads], the tokens' weights.
        cos, sin: of the tokens' positions, [batch, seq, 1, head_dim], in training also broadcastable to it.
    """

    key: Tensor
    value: Tensor
    alpha: Tensor
    omega: Tensor
    cos: Tensor
    sin: Tensor

    def take(self, index: Tensor) -> "Tokens":
        """Token i of a row becomes what index[row, i] was; index [batch, new seq]."""
        return Tokens(*(take(x, index) for x in self))


def take(x: Tensor, index: Tensor) -> Tensor:
    """x[row, index[row]]: [batch, seq, ...], [batch, new seq] -> [batch, new seq, ...]."""
    return x[index.new_tensor(range(len(index)))[:, None], index]
