"""Rows that a model has beyond its base's tokens, so that tensor parallelism can divide them."""

from collections.abc import Sequence
from pathlib import Path

import torch
import torch.distributed as dist
from megatron.core import parallel_state

from megatron_dmc.checkpoint.weights import without_wrapper
from megatron_dmc.data.tokenizer import load_tokenizer

# The weights with a row per token, on the pipeline stages that have them.
_ROWS_PER_TOKEN = ("embedding.word_embeddings.weight", "output_layer.weight")
# torch copies what it sums in another dtype: in float64 that would be four times a bfloat16 embedding.
_ROWS_AT_ONCE = 1024


def known_tokens(rows: int, of_base: int, tokenizer: str | Path) -> int:
    """Rows that are tokens: the base's, and what a run's tokenizer adds to them. An export leaves out those after them.

    Raises:
        ConfigError: ``tokenizer`` is no folder of a tokenizer.
    """
    return rows if of_base == rows else min(rows, max(of_base, load_tokenizer(tokenizer).vocab_size))


@torch.no_grad()
def fill_added_rows(model_chunks: Sequence[torch.nn.Module], vocabulary: int) -> None:
    """Sets the rows from ``vocabulary`` on to the mean of those before; every tensor-parallel rank calls this.

    The logit of an added row is then the mean of all logits, whatever the input: it is never the largest one, and its
    probability is at most the mean of the others' (Jensen's inequality). So greedy choices stay, and p rows added to V
    raise a loss by at most log(1 + p / V). (Zeros would win wherever all logits are negative.)
    """
    for chunk in model_chunks:
        for name, weight in without_wrapper(chunk).named_parameters():
            if has_row_per_token(name):
                fill_rows(weight, vocabulary)


def has_row_per_token(name: str) -> bool:
    """Whether a parameter is the embedding's or the output layer's."""
    return name in _ROWS_PER_TOKEN


@torch.no_grad()
def fill_rows(weight: torch.Tensor, vocabulary: int) -> None:
    """:func:`fill_added_rows` of one weight, [this rank's tokens, hidden]."""
    group = parallel_state.get_tensor_model_parallel_group()
    first = dist.get_rank(group) * len(weight)
    own = min(max(vocabulary - first, 0), len(weight))
    parts = [rows.sum(0, dtype=torch.float64) for rows in weight[:own].split(_ROWS_AT_ONCE)]
    total = torch.stack(parts).sum(0)
    dist.all_reduce(total, group=group)
    weight[own:] = (total / vocabulary).to(weight.dtype)
