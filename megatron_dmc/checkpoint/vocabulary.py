"""Rows of tokens that a model has beyond its base's vocabulary, so that tensor parallelism can divide it."""

from collections.abc import Sequence

import torch
import torch.distributed as dist
from megatron.core import parallel_state

from megatron_dmc.checkpoint.weights import without_wrapper

# The weights with a row per token, on the pipeline stages that have them.
_ROWS_PER_TOKEN = ("embedding.word_embeddings.weight", "output_layer.weight")


@torch.no_grad()
def fill_added_rows(model_chunks: Sequence[torch.nn.Module], vocabulary: int) -> None:
    """Sets the rows of tokens from ``vocabulary`` on to the mean of all others; every tensor-parallel rank calls this.

    An added token's logit is then the mean of all logits: it is never the largest, see ``convert.from_hf.pad_vocabulary``.
    """
    group = parallel_state.get_tensor_model_parallel_group()
    for chunk in model_chunks:
        for name, weight in without_wrapper(chunk).named_parameters():
            if name in _ROWS_PER_TOKEN:
                first = dist.get_rank(group) * len(weight)
                own = min(max(vocabulary - first, 0), len(weight))
                total = weight[:own].sum(0, dtype=torch.float64)
                dist.all_reduce(total, group=group)
                weight[own:] = (total / vocabulary).to(weight.dtype)
