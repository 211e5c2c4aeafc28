"""Checks of a recipe's settings against one another; they need no model and no process group."""

import math
from collections.abc import Sequence

from megatron_dmc.config import ConfigError, DMCConfig
from megatron_dmc.model.model_config import ModelConfig
from megatron_dmc.recipe.layout import check_layout
from megatron_dmc.recipe.sections import PhaseConfig, Recipe

# megatron-core holds an index of all of a run's samples in memory.
MOST_SAMPLES = 2**31 - 1
# What the sizes of an FP8 matrix product must be multiples of.
FP8_MULTIPLE = 16


# What flash-attention kernels have: head dimensions that are multiples of this, up to the widest one.
HEAD_DIM_MULTIPLE = 8
WIDEST_HEAD = 256


def check_head_dim(model: ModelConfig, dmc: DMCConfig | None) -> None:
    """Raises ConfigError for a head dimension that the attention kernels of a GPU do not have.

    Args:
        dmc: None for a model without decisions.
    """
    # The projection's bias per key travels in channels that are added to the head; neuron has one to spare.
    widened = HEAD_DIM_MULTIPLE if dmc is not None and dmc.decision_source == "projection" else 0
    widest = WIDEST_HEAD - widened
    if model.head_dim % HEAD_DIM_MULTIPLE or model.head_dim > widest:
        what = " with dmc.decision_source projection" if widened else ""
        raise ConfigError(
            f"the head dimension (model.kv_channels, or hidden_size / num_attention_heads) must be a multiple of "
            f"{HEAD_DIM_MULTIPLE} and <= {widest}{what}, got {model.head_dim}: flash-attention kernels have no other; such a "
            "model cannot be used here"
        )


def check_recipe(recipe: Recipe) -> None:
    """All checks of a run's settings against one another, before anything is built.

    Raises:
        ConfigError: the first setting that cannot work, with the remedy.
    """
    model, training, parallel, phases = recipe.model, recipe.training, recipe.parallel, recipe.phases
    model.check()
    check_head_dim(model, recipe.dmc if recipe.merges else None)
    for section, config in (("training", training), ("parallel", parallel)):
        for name, value in vars(config).items():
            if isinstance(value, int) and not isinstance(value, bool) and name != "seed" and value < 1:
                raise ConfigError(f"{section}.{name} must be >= 1, got {value}")
    for name, smallest in (("log_interval", 1), ("heatmap_interval", 0), ("eval_interval", 0), ("eval_samples", 0)):
        if getattr(recipe.monitor, name) < smallest:
            raise ConfigError(f"monitor.{name} must be >= {smallest}, got {getattr(recipe.monitor, name)}")
    for name, folder in (("data.cache", recipe.data.cache), ("checkpoint.directory", recipe.checkpoint.directory)):
        if not folder:
            raise ConfigError(f"{name} is empty; name a folder")
    if not recipe.data.train:
        raise ConfigError("data.train is empty; name at least one dataset (the path without .bin and .idx)")
    if not 0 <= recipe.data.seed < 2**32:
        raise ConfigError(f"data.seed must be in [0, 2^32), got {recipe.data.seed}")
    if recipe.data.sequence_length < 2:
        raise ConfigError(f"data.sequence_length must be >= 2, got {recipe.data.sequence_length}")
    if recipe.data.sequence_length > model.max_position_embeddings:
        raise ConfigError(
            f"data.sequence_length ({recipe.data.sequence_length}) exceeds model.max_position_embeddings "
            f"({model.max_position_embeddings}); shorten one or lengthen the other"
        )
    _check_numbers(recipe)
    check_layout(recipe)
    _check_phases(phases, recipe.dmc)
    if recipe.total_steps * training.global_batch_size > MOST_SAMPLES:
        raise ConfigError(
            f"training.global_batch_size ({training.global_batch_size}) x {recipe.total_steps} steps are more than "
            f"{MOST_SAMPLES} samples; at these steps it must be <= {MOST_SAMPLES // recipe.total_steps}"
        )
    if training.fp8 is not None:
        _check_fp8(recipe)
    if recipe.merges:
        _check_window(recipe.dmc, recipe.data.sequence_length)
    _check_base(recipe)


def _check_numbers(recipe: Recipe) -> None:
    """Every number is finite and in its range."""
    sections = [
        (name, getattr(recipe, name)) for name in ("model", "data", "training", "distillation", "checkpoint", "monitor")
    ]
    sections += [(f"phases[{i}]", phase) for i, phase in enumerate(recipe.phases)]
    for section, config in sections:
        for name, value in vars(config).items():
            if isinstance(value, float) and not math.isfinite(value):
                raise ConfigError(f"{section}.{name} must be a finite number, got {value}")
    training, checkpoint = recipe.training, recipe.checkpoint
    for name, value, low, high in (
        ("training.adam_beta1", training.adam_beta1, 0, 1),
        ("training.adam_beta2", training.adam_beta2, 0, 1),
        ("training.adam_eps", training.adam_eps, 1e-30, 1),
        ("training.clip_grad", training.clip_grad, 0, math.inf),
        ("training.weight_decay", training.weight_decay, 0, math.inf),
        ("training.seed", training.seed, 0, 2**32),
        ("checkpoint.save_interval", checkpoint.save_interval, 0, math.inf),
        ("checkpoint.keep_last", checkpoint.keep_last, 1, math.inf),
    ):
        if not low <= value < high:
            raise ConfigError(f"{name} must be in [{low:g}, {high:g}), got {value}")


def _check_phases(phases: Sequence[PhaseConfig], dmc: DMCConfig) -> None:
    if not phases:
        raise ConfigError("phases is empty; a retrofit has zero_out (neuron only), compress and solidify")
    for i, phase in enumerate(phases):
        if phase.steps < 1:
            raise ConfigError(f"phases[{i}].steps must be >= 1, got {phase.steps}")
        if phase.lr <= 0 or (phase.min_lr is not None and not 0 <= phase.min_lr <= phase.lr):
            raise ConfigError(
                f"phases[{i}] needs 0 <= min_lr <= lr and lr > 0, got lr {phase.lr}, min_lr {phase.min_lr}"
            )
        if not 0 <= phase.lr_warmup_steps < phase.steps:
            raise ConfigError(f"phases[{i}].lr_warmup_steps must be in [0, steps), got {phase.lr_warmup_steps}")
        if not 1 <= phase.start_compression_ratio <= dmc.target_compression_ratio:
            raise ConfigError(
                f"phases[{i}].start_compression_ratio must be in [1, dmc.target_compression_ratio = "
                f"{dmc.target_compression_ratio:g}], got {phase.start_compression_ratio:g}"
            )
        if phase.kind == "zero_out" and not dmc.uses_key_channel:
            raise ConfigError(
                f"phases[{i}].kind zero_out is only for dmc.decision_source neuron: projection takes no channel from the "
                "model; remove the phase"
            )


def _check_window(dmc: DMCConfig, sequence_length: int) -> None:
    if dmc.local_window >= sequence_length:
        raise ConfigError(
            f"dmc.local_window ({dmc.local_window}) must be smaller than data.sequence_length ({sequence_length}): no "
            "decision would ever take effect"
        )
    if dmc.local_window * dmc.target_compression_ratio >= sequence_length:
        raise ConfigError(
            f"dmc.target_compression_ratio {dmc.target_compression_ratio:g} is out of reach: the {dmc.local_window} tokens of "
            f"dmc.local_window are kept of every {sequence_length} (data.sequence_length); shorten the window, lengthen "
            f"the sequence, or aim below {sequence_length / dmc.local_window:g}"
        )


def _check_base(recipe: Recipe) -> None:
    """What an adapter and a teacher need."""
    distillation, base = recipe.distillation, recipe.checkpoint.load_base
    if recipe.trains_adapter:
        if not recipe.dmc.has_projection:
            raise ConfigError(
                f"training.train adapter needs dmc.decision_source projection, got {recipe.dmc.decision_source}: the frozen "
                "base has no decisions of its own"
            )
        if any(phase.kind == "pretrain" for phase in recipe.phases):
            raise ConfigError(
                "training.train adapter cannot pretrain (nothing would learn); remove that phase, or train full"
            )
        if base is None:
            raise ConfigError("training.train adapter needs a base to adapt; set checkpoint.load_base")
        if distillation.teacher is not None:
            raise ConfigError(
                f"distillation.teacher {distillation.teacher} cannot be chosen with training.train adapter: the frozen base "
                "teaches; leave it out"
            )
    for name, value, low, high in (
        ("weight", distillation.weight, 0, 1),
        ("temperature", distillation.temperature, 1e-3, math.inf),
        ("top_k", distillation.top_k, 1, recipe.model.vocab_size),
    ):
        if value is not None and not low <= value <= high:
            raise ConfigError(f"distillation.{name} must be in [{low:g}, {high:g}], got {value:g}")
    if recipe.distills and base is None and distillation.teacher is None:
        raise ConfigError(
            f"distillation.weight {distillation.weight:g} needs a base to teach; set checkpoint.load_base or "
            "distillation.teacher, or the weight to 0"
        )
    if recipe.distills and not recipe.merges:
        raise ConfigError("distillation.weight is set, but no phase merges: the base would teach itself; set it to 0")


def _check_fp8(recipe: Recipe) -> None:
    """All but what the machine has, see build.check_machine."""
    model, training, parallel = recipe.model, recipe.training, recipe.parallel
    if not training.bf16:
        raise ConfigError(f"training.fp8 {training.fp8} needs training.bf16 true: what is not FP8 is bfloat16")
    if training.transformer_impl == "local":
        raise ConfigError(
            f"training.fp8 {training.fp8} needs Transformer Engine; set training.transformer_impl to auto, or fp8 to null"
        )
    if recipe.merges and recipe.dmc.uses_key_channel:
        raise ConfigError(
            f"training.fp8 {training.fp8} needs dmc.decision_source projection: the logits of neuron are rows of an FP8 "
            "product, and decide differently in a bfloat16 model; set training.fp8 to null"
        )
    tp, heads = parallel.tensor_model_parallel_size, model.num_attention_heads + 2 * model.num_query_groups
    for name, size in (
        ("model.hidden_size", model.hidden_size),
        ("model.ffn_hidden_size / tensor-parallel ranks", model.ffn_hidden_size // tp),
        ("query heads x head dimension / tensor-parallel ranks", model.num_attention_heads * model.head_dim // tp),
        ("all heads x head dimension / tensor-parallel ranks", heads * model.head_dim // tp),
        (
            "training.micro_batch_size x data.sequence_length / context-parallel ranks",
            training.micro_batch_size * recipe.data.sequence_length // parallel.context_parallel_size,
        ),
    ):
        if size % FP8_MULTIPLE:
            raise ConfigError(
                f"training.fp8 {training.fp8} needs multiples of {FP8_MULTIPLE}, {name} is {size}; set training.fp8 to null"
            )
