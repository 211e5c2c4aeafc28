"""Layouts of a recipe on given GPUs, by their expected time."""

from collections.abc import Callable, Iterator
from dataclasses import dataclass, replace
from itertools import product
from typing import Literal

from megatron_dmc.config import ConfigError
from megatron_dmc.plan.cluster import Cluster, find_layout
from megatron_dmc.plan.communication import data_messages, step_time
from megatron_dmc.plan.estimate import Plan, make_plan
from megatron_dmc.plan.memory import Footprints, StageMemory, chunk_kinds, whole_model
from megatron_dmc.plan.schedule import most_kept
from megatron_dmc.recipe import Recipe, check_recipe, divisors

MICRO_BATCHES = (1, 2, 4)
CONTEXT_RANKS = (1, 2, 4, 8)
# Tokens of a sample that a rank should keep before context parallelism is looked at; the recipe's own size always is.
CONTEXT_TOKENS = 4096
CHUNKS = (None, 2, 4)
RECOMPUTE: tuple[Literal["none", "selective", "full"], ...] = ("none", "selective", "full")


def search(
    recipe: Recipe,
    cluster: Cluster,
    wanted: int = 5,
    footprints: Footprints | None = None,
    show: Callable[[str], None] = lambda state: None,
) -> list[Plan]:
    """The fastest layouts that fit, the best of every tensor x pipeline x context size; all else stays the recipe's.

    Candidates are sorted by an estimate of their time and memory, in which a stage is an even part of the model and a
    micro-batch so many times one sample; then they are planned one after the other until enough of them fit.

    Args:
        show: is told how far the search is.
    """
    footprints = footprints or Footprints()
    weights, learned = whole_model(recipe)
    possible = [
        candidate
        for candidate in candidates(recipe, cluster)
        if _state_bytes(candidate, cluster, weights, learned) <= cluster.gpu.usable
    ]
    estimates = []
    for done, candidate in enumerate(possible, start=1):
        show(f"estimating layout {done} of {len(possible)}")
        estimates.append(_estimate(candidate, cluster, weights, learned, footprints))
    best: dict[tuple[int, ...], Plan] = {}
    for estimate in sorted(estimates, key=lambda estimate: estimate.seconds):
        parallel = estimate.recipe.parallel
        sizes = (
            parallel.tensor_model_parallel_size,
            parallel.pipeline_model_parallel_size,
            parallel.context_parallel_size,
        )
        if sizes in best or estimate.memory > cluster.gpu.usable:
            continue
        show(f"planning the fastest: {len(best)} of {wanted} found")
        plan = make_plan(estimate.recipe, cluster, footprints)
        if plan.fits:
            best[sizes] = plan
            if len(best) == wanted:
                break
    return sorted(best.values(), key=lambda plan: plan.time.total)


def smaller_plan(plan: Plan, footprints: Footprints) -> Plan | None:
    """A plan that fits, one change away from one that does not: all recomputed, or twice as many pipeline stages."""
    training, parallel = plan.recipe.training, plan.recipe.parallel
    recomputed = replace(plan.recipe, training=replace(training, recompute="full"))
    longer = replace(parallel, pipeline_model_parallel_size=2 * parallel.pipeline_model_parallel_size)
    for recipe in (recomputed, replace(plan.recipe, parallel=longer), replace(recomputed, parallel=longer)):
        try:
            check_recipe(recipe)
            other = make_plan(recipe, plan.cluster, footprints)
        except ConfigError:
            continue
        if other.fits:
            return other
    return None


def candidates(recipe: Recipe, cluster: Cluster) -> Iterator[Recipe]:
    """Every layout that a run would accept, with sequence parallelism wherever there is tensor parallelism."""
    tensor_sizes = [size for size in divisors(recipe.model.num_query_groups) if size <= cluster.gpus_per_node]
    pipeline_sizes = divisors(recipe.model.num_layers)
    seq = recipe.data.sequence_length
    context_sizes = {size for size in CONTEXT_RANKS if size == 1 or seq // size >= CONTEXT_TOKENS}
    context_sizes.add(recipe.parallel.context_parallel_size)
    for tensor, pipeline, context, chunks, micro_batch, recompute in product(
        tensor_sizes, pipeline_sizes, sorted(context_sizes), CHUNKS, MICRO_BATCHES, RECOMPUTE
    ):
        if cluster.gpus % (tensor * pipeline * context):
            continue
        candidate = replace(
            recipe,
            training=replace(recipe.training, micro_batch_size=micro_batch, recompute=recompute),
            parallel=replace(
                recipe.parallel,
                tensor_model_parallel_size=tensor,
                pipeline_model_parallel_size=pipeline,
                virtual_pipeline_model_parallel_size=chunks,
                context_parallel_size=context,
                sequence_parallel=tensor > 1,
            ),
        )
        try:
            check_recipe(candidate)
            find_layout(candidate, cluster)
        except ConfigError:
            continue
        yield candidate


@dataclass(frozen=True)
class _Estimate:
    recipe: Recipe
    seconds: float
    memory: float


def _estimate(recipe: Recipe, cluster: Cluster, weights: int, learned: int, footprints: Footprints) -> _Estimate:
    parallel = recipe.parallel
    layout = find_layout(recipe, cluster)
    stages, chunks = parallel.pipeline_model_parallel_size, parallel.virtual_pipeline_model_parallel_size or 1
    layers = (recipe.model.num_layers // (stages * chunks),) * chunks
    gradients = 4 * learned // (stages * parallel.tensor_model_parallel_size)
    even = StageMemory(0, layers, 0, 0, 0, gradients, 0, 0, 0)
    message = data_messages(recipe, even, layout)
    time = step_time(recipe, [layers] * stages, [message], layout, cluster.gpu, cluster.mfu, footprints=footprints)
    one = replace(recipe, training=replace(recipe.training, micro_batch_size=1))
    ran = [footprints.chunk(one, kind, count) for kind, count in zip(chunk_kinds(recipe, 0), layers, strict=True)]
    kept = most_kept([chunk.kept for chunk in ran], 0, stages, layout.micro_batches)
    memory = _state_bytes(recipe, cluster, weights, learned) + recipe.training.micro_batch_size * kept
    return _Estimate(recipe, time.total, memory)


def _state_bytes(recipe: Recipe, cluster: Cluster, weights: int, learned: int) -> float:
    """Of an even part of the model: parameters, gradients and optimizer."""
    parallel = recipe.parallel
    ranks = parallel.tensor_model_parallel_size * parallel.pipeline_model_parallel_size
    shards = cluster.gpus // ranks if parallel.use_distributed_optimizer else 1
    copies = 2 if recipe.teacher is not None else 1
    width, state = (2, 12) if recipe.training.bf16 else (4, 8)
    return (width * copies * weights + (4 + state / shards) * learned) / ranks
