"""later_attention of a sequence that is cut over a context-parallel group."""

from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor

from megatron_dmc.ops.context_parallel import gather_sequence, local_positions
from megatron_dmc.ops.later_attention.api import later_attention
from megatron_dmc.ops.later_attention.types import Tokens


def context_parallel_later_attention(
    queries: Tokens, keys: Tokens, *, documents: Tensor | None, group: dist.ProcessGroup, **settings: Any
) -> Tensor:
    """As later_attention, on this rank's two chunks of a sequence (see ops/context_parallel.py).

    Keys travel, queries stay: every rank has the largest share that its own queries pay, and the largest of all ranks counts.

    Args:
        queries, keys: this rank's tokens; their positions and documents are not read.
        documents: int64 [batch, seq], of the whole sequence; None: a row is one document.
        settings: later_attention's others.

    Returns:
        [batch, seq / ranks, kv_heads].
    """
    here, device = keys.vectors.shape[1], keys.vectors.device
    mine = local_positions(here, group).to(device)
    every = Tokens(
        gather_sequence(keys.vectors, group),
        gather_sequence(keys.log_weight, group),
        torch.arange(here * dist.get_world_size(group), device=device),
        documents,
    )
    queries = queries._replace(positions=mine, documents=None if documents is None else documents[:, mine])
    scores = later_attention(queries, every, **settings).contiguous()
    dist.all_reduce(scores, op=dist.ReduceOp.MAX, group=group)
    return scores[:, mine]
