"""Functions that the tests of plans run in another process."""

import contextlib
import io
from dataclasses import replace
from typing import Any

import torch
from megatron.core.pipeline_parallel.schedules import get_pp_rank_microbatches

from megatron_dmc.cli import main
from megatron_dmc.plan.estimate import Cluster, Plan, make_plan
from megatron_dmc.plan.footprint import Footprint, _batch, run_micro_batch
from megatron_dmc.plan.gpus import GPUS
from megatron_dmc.plan.memory import Footprints, StageMemory, stage_memory
from megatron_dmc.plan.rank import META, fake_rank, stage_chunks
from megatron_dmc.plan.report import verdict
from megatron_dmc.plan.search import search, smaller_plan
from megatron_dmc.recipe import ParallelConfig, Recipe, load_recipe
from megatron_dmc.training.forward_step import DistillationStep, forward_step
from tests.support.processes import ROOT

LLAMA2_70B = ROOT / "examples/llama2_70b_dmc8/recipe.yaml"
H100 = Cluster(nodes=16, gpus_per_node=8, gpu=GPUS["h100"], mfu=0.4)

# What the layer's costs were counted by hand for.
COUNTED = (
    *("dmc.operation=merge", "dmc.ratio_control=loss"),
    'phases=[{"kind": "compress", "steps": 700, "lr": 5e-4}, {"kind": "solidify", "steps": 240, "lr": 1e-4}]',
)
# Small sizes that the layouts divide as they divide a large model's; all weights train.
TINY = (
    *("model.num_layers=4", "model.hidden_size=64", "model.ffn_hidden_size=96", "model.num_attention_heads=8"),
    *("model.num_query_groups=4", "model.vocab_size=128", "model.max_position_embeddings=256", "dmc.local_window=16"),
    *("dmc.target_compression_ratio=4", "data.sequence_length=128", "training.train=full", "distillation.weight=0"),
    *("training.recompute=none", "parallel.tensor_model_parallel_size=1", "parallel.sequence_parallel=false"),
    *COUNTED,
)
FULL_70B = ("training.train=full", "distillation.weight=0", *COUNTED)
PAIRS_70B = (*FULL_70B, "training.micro_batch_size=2", "training.global_batch_size=32")


def tiny(*overrides: str) -> Recipe:
    return load_recipe(LLAMA2_70B, [*TINY, *overrides])


def plan(recipe: Recipe, cluster: Cluster = H100) -> Plan:
    return make_plan(recipe, cluster)


def stages(recipe: Recipe, world_size: int) -> list[StageMemory]:
    return stage_memory(recipe, world_size, Footprints())


def footprint(recipe: Recipe, kind: str, layers: int) -> Footprint:
    """As a plan estimates it from chunks of one and two layers."""
    return Footprints().chunk(recipe, kind, layers)


def run_whole(recipe: Recipe) -> Footprint:
    """One micro-batch through the whole model at once."""
    with fake_rank(recipe.parallel, recipe.parallel.tensor_model_parallel_size, 0):
        (chunk,), teachers = stage_chunks(recipe)
        return run_micro_batch(recipe, chunk, teachers[0] if teachers else None, META, receives=False)


def bytes_saved_on_a_cpu(recipe: Recipe) -> int:
    """What autograd really saves of one micro-batch: torch's hooks on real tensors, each storage once.

    Neither parameters nor the batch are counted. With ``data.reset_at_documents`` every sample holds three documents.
    """
    device = torch.device("cpu")
    with fake_rank(ParallelConfig(), 1, 0, device):
        chunks, teachers = stage_chunks(recipe, device)
        (chunk,) = chunks
        with torch.no_grad():
            for parameter in chunk.parameters():
                parameter.normal_(std=0.02)
        step: Any = DistillationStep(recipe.distillation, chunks, teachers) if recipe.distills else forward_step
        saved: dict[int, torch.UntypedStorage] = {}

        def save(tensor: torch.Tensor) -> torch.Tensor:
            saved[tensor.untyped_storage().data_ptr()] = tensor.untyped_storage()
            return tensor

        batch = _batch(recipe, device)
        if recipe.data.reset_at_documents:
            starts = torch.zeros(recipe.training.micro_batch_size, recipe.data.sequence_length, dtype=torch.bool)
            starts[:, [0, 30, 70]] = True
            batch["document_starts"] = starts
        with torch.autograd.graph.saved_tensors_hooks(save, lambda tensor: tensor):
            output, loss = step(iter([batch]), chunk)
            total = loss(output)[0]
        assert bool(torch.isfinite(total))
        there = {tensor.untyped_storage().data_ptr() for tensor in (*chunk.parameters(), *batch.values())}
        return sum(storage.nbytes() for place, storage in saved.items() if place not in there)


def real_shapes(recipe: Recipe) -> dict[str, tuple[int, ...]]:
    """Of the parameters of the undivided model, built with real tensors."""
    with fake_rank(ParallelConfig(), 1, 0, torch.device("cpu")):
        (chunk,), _ = stage_chunks(replace(recipe, parallel=ParallelConfig()), torch.device("cpu"))
        return {name: tuple(parameter.shape) for name, parameter in chunk.named_parameters()}


def megatrons_warmup(parallel: ParallelConfig, stage: int, micro_batches: int) -> int:
    world = parallel.pipeline_model_parallel_size
    with fake_rank(parallel, world, stage):
        chunks = parallel.virtual_pipeline_model_parallel_size or 1
        return get_pp_rank_microbatches(micro_batches, chunks, world)[2]


def refused(recipe: Recipe, cluster: Cluster = H100) -> tuple[Plan, str, Plan | None]:
    """A plan that does not fit, its verdict, and the nearest that does."""
    footprints = Footprints()
    made = make_plan(recipe, cluster, footprints)
    smaller = smaller_plan(made, footprints)
    return made, verdict(made, smaller), smaller


def found(recipe: Recipe, cluster: Cluster, wanted: int) -> list[Plan]:
    return search(recipe, cluster, wanted)


def command(*arguments: Any) -> tuple[int, str, str]:
    """Exit status, stdout and stderr of ``megatron-dmc``."""
    out, err = io.StringIO(), io.StringIO()
    with contextlib.redirect_stdout(out), contextlib.redirect_stderr(err):
        status = main([str(argument) for argument in arguments])
    return status, out.getvalue(), err.getvalue()
