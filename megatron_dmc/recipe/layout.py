"""Checks of a parallel layout: which sizes a model can be divided by, and which sizes would work instead."""

import math
from collections.abc import Sequence

from megatron_dmc.config import ConfigError
from megatron_dmc.recipe.sections import Recipe


def check_layout(recipe: Recipe) -> None:
    """Everything about a layout but what depends on the number of processes."""
    model, parallel, sequence_length = recipe.model, recipe.parallel, recipe.data.sequence_length
    tp, pp, vpp = (
        parallel.tensor_model_parallel_size,
        parallel.pipeline_model_parallel_size,
        parallel.virtual_pipeline_model_parallel_size,
    )
    if parallel.sequence_parallel and tp == 1:
        raise ConfigError("parallel.sequence_parallel needs tensor_model_parallel_size > 1; set it to false")
    if model.num_query_groups % tp:
        raise ConfigError(
            f"parallel.tensor_model_parallel_size ({tp}) must divide model.num_query_groups "
            f"({model.num_query_groups}): a KV head and its decisions live on one rank; {_tensor_sizes(recipe)}"
        )
    if model.ffn_hidden_size % tp:
        raise ConfigError(
            f"parallel.tensor_model_parallel_size ({tp}) must divide model.ffn_hidden_size ({model.ffn_hidden_size}); "
            f"{_tensor_sizes(recipe)}"
        )
    if model.vocab_size % tp:
        raise ConfigError(
            f"model.vocab_size ({model.vocab_size}) must be divisible by parallel.tensor_model_parallel_size ({tp}); "
            f"set it to {model.vocab_size + -model.vocab_size % tp} (a base is padded when it is loaded, or once for all by "
            f"megatron-dmc convert-from-hf --pad-vocab-to-multiple-of {tp}), or use another size; {_tensor_sizes(recipe)}"
        )
    if vpp is not None and pp == 1:
        raise ConfigError(
            f"parallel.virtual_pipeline_model_parallel_size ({vpp}) needs pipeline_model_parallel_size > 1; set it to null"
        )
    if vpp == 1:
        raise ConfigError(
            "parallel.virtual_pipeline_model_parallel_size must be >= 2, or null for no virtual stages, got 1"
        )
    if model.num_layers % (pp * (vpp or 1)):
        raise ConfigError(
            f"model.num_layers ({model.num_layers}) must be divisible by the pipeline's {pp * (vpp or 1)} stages "
            f"(pipeline_model_parallel_size {pp} x virtual_pipeline_model_parallel_size {vpp or 1}); "
            f"numbers of stages that work: {_listed(divisors(model.num_layers))}"
        )
    if parallel.context_parallel_size > 1:
        _check_context_parallel(recipe)
    if parallel.sequence_parallel and sequence_length % tp:
        raise ConfigError(
            f"data.sequence_length ({sequence_length}) must be divisible by tensor_model_parallel_size ({tp}) under "
            f"parallel.sequence_parallel; use {_near(sequence_length, tp)}, or another tensor_model_parallel_size"
        )


def _check_context_parallel(recipe: Recipe) -> None:
    parallel, tp, cp = (
        recipe.parallel,
        recipe.parallel.tensor_model_parallel_size,
        recipe.parallel.context_parallel_size,
    )
    length, heads = recipe.data.sequence_length, recipe.model.num_query_groups // tp
    # Two chunks per rank, and under sequence parallelism tensor-parallel ranks share them.
    step = 2 * cp if not parallel.sequence_parallel else math.lcm(2 * cp, tp * cp)
    if length % step:
        raise ConfigError(
            f"data.sequence_length ({length}) must be divisible by {step} for parallel.context_parallel_size {cp}: it is cut "
            f"into {2 * cp} chunks; use {_near(length, step)}, or another context_parallel_size"
        )
    if parallel.cp_comm_type == "a2a" and heads % cp:
        raise ConfigError(
            f"parallel.cp_comm_type a2a needs parallel.context_parallel_size ({cp}) to divide the {heads} KV heads of a "
            f"tensor-parallel rank; use a context_parallel_size of {_listed(divisors(heads))}, or cp_comm_type all_gather"
        )
    if recipe.dmc.window_size is not None and recipe.merges:
        raise ConfigError(
            f"dmc.window_size ({recipe.dmc.window_size}) must be null for parallel.context_parallel_size > 1: a "
            "truncated slot has no carry from rank to rank; set window_size to null, or context_parallel_size to 1"
        )


def check_batch(recipe: Recipe, replicas: int) -> None:
    """Raises ConfigError unless so many data-parallel replicas can share the global batch."""
    training, parallel = recipe.training, recipe.parallel
    round_size = training.micro_batch_size * replicas
    # Interleaved stages take micro-batches in groups as large as the pipeline is long.
    interleaves = parallel.virtual_pipeline_model_parallel_size is not None
    group = parallel.pipeline_model_parallel_size if interleaves else 1
    if training.global_batch_size % (round_size * group):
        pipeline = f" x interleaved pipeline stages ({group})" if interleaves else ""
        sizes = [round_size * group * (training.global_batch_size // (round_size * group) + i) for i in (0, 1)]
        raise ConfigError(
            f"training.global_batch_size ({training.global_batch_size}) must be a multiple of micro_batch_size "
            f"({training.micro_batch_size}) x data-parallel replicas ({replicas}){pipeline}; sizes near it that work: "
            f"{_listed([size for size in sizes if size])}"
        )


def _tensor_sizes(recipe: Recipe) -> str:
    """The tensor-parallel sizes that a model allows, for a message."""
    model, parallel = recipe.model, recipe.parallel
    lengths = recipe.data.sequence_length if parallel.sequence_parallel else 0
    sizes = [
        size
        for size in divisors(model.num_query_groups)
        if not any(
            x % size for x in (model.ffn_hidden_size, model.vocab_size, lengths // parallel.context_parallel_size)
        )
    ]
    return f"tensor-parallel sizes that work: {_listed(sizes)}"


def divisors(number: int) -> list[int]:
    """In rising order."""
    small = [size for size in range(1, math.isqrt(number) + 1) if number % size == 0]
    return small + [number // size for size in reversed(small) if size**2 != number]


def _near(length: int, step: int) -> str:
    """The multiples of ``step`` next to a length, for a message."""
    below = length - length % step
    return " or ".join(str(near) for near in (below, below + step) if near)


def _listed(sizes: Sequence[int]) -> str:
    return ", ".join(map(str, sizes))
