"""Runs as ranks: the logits of imported models in a layout, which rank 0 of the last stage writes; all save them again.

Arguments: tensor- and pipeline-parallel ranks, then a checkpoint and a file for its logits, again and again. ``again`` beside
the file is the checkpoint that the ranks have saved.
"""

import sys
from pathlib import Path

import torch
import torch.distributed as dist
from megatron.core import parallel_state
from megatron.core.tensor_parallel import gather_from_tensor_model_parallel_region
from torch import Tensor

from megatron_dmc.checkpoint import SavedModel, save_checkpoint
from megatron_dmc.checkpoint.weights import model_state
from megatron_dmc.distributed.world import world
from megatron_dmc.model.gpt import build_model, transformer_config
from megatron_dmc.recipe import ParallelConfig
from tests.support.llamas import TOKENS


@torch.no_grad()
def logits(checkpoint: Path, folder: Path, parallel: ParallelConfig) -> Tensor | None:
    """[batch, seq, vocabulary] on the last pipeline stage; saves the model in ``folder``."""
    saved = SavedModel.open(checkpoint)
    model = saved.recipe.model
    layout = {
        "tensor_model_parallel_size": parallel.tensor_model_parallel_size,
        "pipeline_model_parallel_size": parallel.pipeline_model_parallel_size,
    }
    network = build_model(model, saved.dmc, transformer_config(model, **layout)).eval()
    saved.load_into([network])
    save_checkpoint(folder, "again", model_state([network]), saved.info)
    before = parallel_state.get_pipeline_model_parallel_prev_rank()
    after = parallel_state.get_pipeline_model_parallel_next_rank()
    if not parallel_state.is_pipeline_first_stage():
        hidden = torch.empty(TOKENS.shape[1], TOKENS.shape[0], model.hidden_size)
        dist.recv(hidden, before)
        network.set_input_tensor(hidden)
    out = network(TOKENS, torch.arange(TOKENS.shape[1]).expand_as(TOKENS), None)
    if not parallel_state.is_pipeline_last_stage():
        dist.send(out.contiguous(), after)
        return None
    return gather_from_tensor_model_parallel_region(out)


def main(tensor: int, pipeline: int, pairs: list[str]) -> None:
    parallel = ParallelConfig(tensor_model_parallel_size=tensor, pipeline_model_parallel_size=pipeline)
    with world(parallel):
        for checkpoint, output in zip(pairs[::2], pairs[1::2], strict=True):
            found = logits(Path(checkpoint), Path(output).parent, parallel)
            if found is not None and parallel_state.get_tensor_model_parallel_rank() == 0:
                torch.save(found, output)


if __name__ == "__main__":
    torch.set_num_threads(1)
    main(int(sys.argv[1]), int(sys.argv[2]), sys.argv[3:])
