"""later_attention of a sequence that is cut over a context-parallel group."""

from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor

from megatron_dmc.ops.context_parallel import gather_sequence, local_positions
from megatron_dmc.ops.later_attention.api import later_attention
from megatron_dmc.ops.later_attention.types import Places


def context_parallel_later_attention(
    query: Tensor,
    key: Tensor,
    *,
    group: dist.ProcessGroup,
    documents: Tensor | None,
    key_weight: Tensor,
    **settings: Any,
) -> Tensor:
    """As later_attention, on this rank's two chunks of a sequence (see ops/context_parallel.py).

    Keys travel, queries stay: every rank has the largest share that its own queries pay, and the largest of all ranks counts.

    Args:
        query, key, key_weight: of this rank's tokens.
        documents: int64 [batch, seq], of the whole sequence; None: a row is one document.
        settings: later_attention's others.

    Returns:
        [batch, seq / ranks, kv_heads].
    """
    mine = local_positions(key.shape[1], group).to(query.device)
    positions = torch.arange(key.shape[1] * dist.get_world_size(group), device=query.device)
    scores = later_attention(
        query,
        gather_sequence(key, group),
        query_places=Places(mine, None if documents is None else documents[:, mine]),
        key_places=Places(positions, documents),
        key_weight=gather_sequence(key_weight, group),
        **settings,
    ).contiguous()
    dist.all_reduce(scores, op=dist.ReduceOp.MAX, group=group)
    return scores[:, mine]
