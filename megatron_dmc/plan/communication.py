"""What a rank sends in a step, and how long the step takes.

Bytes are what one rank sends, collectives as rings: an all-gather or a reduce-scatter of n bytes over r ranks sends
n (r - 1) / r, an all-reduce twice that. Ranks are numbered as megatron-core does it: tensor, context, data, pipeline, so the
first of these are inside a node.
"""

from collections.abc import Sequence
from dataclasses import asdict, dataclass
from math import prod

from megatron_dmc.plan.cluster import Layout
from megatron_dmc.plan.flops import Work, layer_work, output_work
from megatron_dmc.plan.footprint import message_shape
from megatron_dmc.plan.gpus import GPU
from megatron_dmc.plan.memory import Footprints, StageMemory, chunk_kinds
from megatron_dmc.plan.schedule import bubble_share
from megatron_dmc.recipe import Recipe

# Of a link's data-sheet rate, what collectives are taken to reach. An assumption.
LINK_EFFICIENCY = 0.8


@dataclass(frozen=True)
class Traffic:
    """Bytes per step of the rank that sends most, by kind of parallelism."""

    tensor: float = 0.0
    pipeline: float = 0.0
    context: float = 0.0
    data: float = 0.0


@dataclass(frozen=True)
class StepTime:
    """Seconds of a step; they add up to ``total``.

    Attributes:
        compute: time of the model's operations at the stated MFU, on the slowest pipeline stage.
        recompute: time of those that are run again.
        bubble: time in which the pipeline fills and empties.
        tensor, context, pipeline, data: time of communication that no computation hides.
    """

    compute: float
    recompute: float
    bubble: float
    tensor: float
    context: float
    pipeline: float
    data: float

    @property
    def total(self) -> float:
        return sum(asdict(self).values())


@dataclass(frozen=True)
class _Stage:
    """One stage's share of a micro-batch."""

    work: Work
    tensor: float
    context: float
    pipeline: float


def stage_traffic(recipe: Recipe, stages: Sequence[StageMemory], layout: Layout, footprints: Footprints) -> Traffic:
    """Bytes per step."""
    ran = [_stage(recipe, stage.stage, stage.layers, footprints) for stage in stages]
    return Traffic(
        tensor=layout.micro_batches * max(stage.tensor for stage in ran),
        pipeline=layout.micro_batches * max(stage.pipeline for stage in ran) + _shared_gradient(recipe),
        context=layout.micro_batches * max(stage.context for stage in ran),
        data=max(sum(data_messages(recipe, stage, layout)) for stage in stages),
    )


def data_messages(recipe: Recipe, stage: StageMemory, layout: Layout) -> tuple[float, float]:
    """Bytes of the gradients' reduction (float32), and of gathering the updated parameters from their shards."""
    ranks = layout.replicas * recipe.parallel.context_parallel_size
    ring = (ranks - 1) / ranks
    if not recipe.parallel.use_distributed_optimizer:
        return 2 * ring * stage.gradients, 0.0
    return ring * stage.gradients, ring * stage.gradients / (2 if recipe.training.bf16 else 1)


def step_time(
    recipe: Recipe,
    layers: Sequence[tuple[int, ...]],
    data: Sequence[tuple[float, float]],
    layout: Layout,
    gpu: GPU,
    mfu: float,
    *,
    footprints: Footprints,
) -> StepTime:
    """The slowest stage's micro-batch, m times, and what comes on top.

    Args:
        layers: of every stage's chunks.
        data: of every stage, see data_messages.
    """
    parallel = recipe.parallel
    ran = [_stage(recipe, i, counts, footprints) for i, counts in enumerate(layers)]
    inner = parallel.tensor_model_parallel_size, parallel.context_parallel_size, layout.replicas
    rates = [_rate(prod(inner[: i + 1]), layout, gpu) for i in range(len(inner))]
    flops = mfu * gpu.peak_flops * parallel.tensor_model_parallel_size * parallel.context_parallel_size
    between = _rate(layout.world_size, layout, gpu)
    # Interleaved stages send while they compute (overlap_p2p_comm).
    chunks = parallel.virtual_pipeline_model_parallel_size or 1
    exposed = 0.0 if chunks > 1 else 1 / between
    samples = recipe.training.micro_batch_size
    shares = [
        (
            samples * stage.work.model / flops,
            samples * stage.work.recomputed / flops,
            stage.tensor / rates[0],
            stage.context / rates[1],
            stage.pipeline * exposed,
        )
        for stage in ran
    ]
    slowest = max(shares, key=sum)
    compute, recompute, tensor, context, pipeline = (layout.micro_batches * share for share in slowest)
    bubble = bubble_share(parallel.pipeline_model_parallel_size, chunks, layout.micro_batches) * sum(
        (compute, recompute, tensor, context, pipeline)
    )
    # One micro-batch's backward pass hides the reduction, its forward pass the gathering.
    hides = sum(slowest) if parallel.overlap else 0.0
    seconds = [(reduced / rates[2], gathered / rates[2]) for reduced, gathered in data]
    exposed_data = max(max(0.0, a - 2 / 3 * hides) + max(0.0, b - 1 / 3 * hides) for a, b in seconds)
    pipeline += _shared_gradient(recipe) / between
    return StepTime(compute, recompute, bubble, tensor, context, pipeline, exposed_data)


def _rate(ranks: int, layout: Layout, gpu: GPU) -> float:
    """Bytes per second of a group whose members lie within so many consecutive ranks."""
    return LINK_EFFICIENCY * (gpu.link if ranks <= layout.gpus_per_node else gpu.network)


def _stage(recipe: Recipe, stage: int, layers: tuple[int, ...], footprints: Footprints) -> _Stage:
    kinds = chunk_kinds(recipe, stage)
    sent = [footprints.sent(recipe, kind, count) for kind, count in zip(kinds, layers, strict=True)]
    work = layer_work(recipe) * sum(layers)
    if kinds[-1] in ("last", "only"):
        work = work + output_work(recipe)
    sends = sum((kind in ("first", "middle")) + (kind in ("middle", "last")) for kind in kinds)
    return _Stage(
        work,
        tensor=sum(one.get("tensor", 0.0) for one in sent),
        context=sum(one.get("context", 0.0) for one in sent),
        pipeline=sends * prod(message_shape(recipe)) * (2 if recipe.training.bf16 else 4),
    )


def _shared_gradient(recipe: Recipe) -> float:
    """The float32 gradient of embeddings that the first and the last stage share, all-reduced between the two once a step."""
    model, parallel = recipe.model, recipe.parallel
    shared = model.share_embeddings_and_output_weights and parallel.pipeline_model_parallel_size > 1
    if not shared or recipe.trains_adapter:
        return 0.0
    return 4.0 * model.vocab_size * model.hidden_size / parallel.tensor_model_parallel_size
