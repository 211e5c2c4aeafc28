"""From keys and values before rotary embedding to the tensors of attention: raw keys for the local window, and slots."""

from collections.abc import Callable
from typing import Any

from torch import Tensor

from megatron_dmc.ops.attention.types import Operation
from megatron_dmc.ops.decisions import clear_channel
from megatron_dmc.ops.pooling import pool
from megatron_dmc.ops.rotary import rotate
from megatron_dmc.ops.tokens import Tokens


def attention_states(
    query: Tensor,
    tokens: Tokens,
    *,
    local_window: int,
    operation: Operation,
    window_size: int | None,
    clear_last_channel: bool,
    document_starts: Tensor | None = None,
    merge: Callable[..., Any] = pool,
) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor]:
    """The first five arguments of windowed_dmc_attention.

    A slot is rotated at the position of its latest token. Without a window no query reads the raw keys, and without merging
    none reads slots: the tensors that are read are returned in their place.

    Args:
        query: [batch, seq, heads, head_dim], before rotary embedding.
        tokens: before rotary embedding.
        local_window, operation, window_size: see DMCConfig.
        clear_last_channel: set the last channel of query and keys to zero after the rotation (the ``neuron`` source).
        document_starts: bool [batch, seq], true where a document begins.
        merge: pool, or its form for a sequence that is cut over ranks.

    Returns:
        query, key, value, pooled_key, pooled_value; query and keys rotated.
    """
    key, value, alpha, omega, cos, sin = tokens

    def rotated(x: Tensor) -> Tensor:
        x = rotate(x, cos, sin)
        return clear_channel(x) if clear_last_channel else x

    query = rotated(query)
    if operation != "merge":
        key = rotated(key)
        return query, key, value, key, value
    pooled_key, pooled_value = merge(key, value, alpha, omega, window_size=window_size, document_starts=document_starts)
    pooled_key = rotated(pooled_key)
    if local_window == 0:
        return query, pooled_key, pooled_value, pooled_key, pooled_value
    return query, rotated(key), value, pooled_key, pooled_value
