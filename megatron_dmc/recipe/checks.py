"""Checks of a recipe's settings against one another; they need no model and no process group."""

import math
from collections.abc import Sequence

from megatron_dmc.config import ConfigError, DMCConfig, check_ranges
from megatron_dmc.errors import or_aim_below
from megatron_dmc.model.model_config import ModelConfig
from megatron_dmc.recipe.layout import check_layout
from megatron_dmc.recipe.sections import UNSEEN_PART, PhaseConfig, Recipe

# megatron-core builds an index of all of a run's samples in the host's memory, so many bytes of each.
INDEX_BYTES = 16
# 4.3 GB.
MOST_SAMPLES = 2**28
# Of a micro-batch, 28 bytes each in the host's memory, and once more while its samples are joined: 0.9 GB.
MOST_TOKENS = 2**24
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
    model, training, phases = recipe.model, recipe.training, recipe.phases
    for name, section in vars(recipe).items():
        for i, part in enumerate(section if isinstance(section, list) else [section]):
            check_ranges(part, f"{name}[{i}]" if isinstance(section, list) else name)
    model.check()
    check_head_dim(model, recipe.dmc if recipe.merges else None)
    for name, folder in (("data.cache", recipe.data.cache), ("checkpoint.directory", recipe.checkpoint.directory)):
        if not folder:
            raise ConfigError(f"{name} is empty; name a folder")
    if not recipe.data.train:
        raise ConfigError("data.train is empty; name at least one dataset (the path without .bin and .idx)")
    if recipe.data.sequence_length > model.max_position_embeddings:
        raise ConfigError(
            f"data.sequence_length ({recipe.data.sequence_length}) exceeds model.max_position_embeddings "
            f"({model.max_position_embeddings}); shorten one or lengthen the other"
        )
    if training.micro_batch_size * recipe.data.sequence_length > MOST_TOKENS:
        raise ConfigError(
            f"training.micro_batch_size ({training.micro_batch_size}) x data.sequence_length "
            f"({recipe.data.sequence_length}) are more than {MOST_TOKENS} tokens; make the micro-batch smaller"
        )
    check_layout(recipe)
    _check_phases(phases, recipe.dmc)
    if recipe.merges:
        _check_window(recipe.dmc, recipe.data.sequence_length)
    _check_calibration(recipe)
    samples = recipe.total_steps * training.global_batch_size
    if samples > MOST_SAMPLES:
        most = MOST_SAMPLES // recipe.total_steps
        remedy = f"at these steps it must be <= {most}" if most else "give the phases fewer steps"
        raise ConfigError(
            f"training.global_batch_size ({training.global_batch_size}) x {recipe.total_steps} steps are more than "
            f"{MOST_SAMPLES} samples, whose index would need {samples * INDEX_BYTES / 1e9:.0f} GB of the host's memory; "
            f"{remedy}"
        )
    if training.fp8 is not None:
        _check_fp8(recipe)
    _check_base(recipe)


def _check_phases(phases: Sequence[PhaseConfig], dmc: DMCConfig) -> None:
    if not phases:
        raise ConfigError("phases is empty; a retrofit has zero_out (neuron only), compress and solidify")
    for i, phase in enumerate(phases):
        if phase.min_lr is not None and phase.min_lr > phase.lr:
            raise ConfigError(f"phases[{i}].min_lr must be <= lr, got lr {phase.lr}, min_lr {phase.min_lr}")
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


def _check_calibration(recipe: Recipe) -> None:
    """Where a ``calibrate`` phase may stand, and that it can see enough."""
    for i, phase in enumerate(recipe.phases):
        if phase.kind != "calibrate":
            continue
        name = f"phases[{i}].kind calibrate"
        if not recipe.dmc.has_projection:
            raise ConfigError(f"{name} is only for dmc.decision_source projection, got {recipe.dmc.decision_source}")
        before = recipe.phases[:i]
        if any(other.kind != "pretrain" for other in before):
            raise ConfigError(
                f"{name} would undo the decisions of phases[{i - 1}]; put it before every phase that merges"
            )
        if not before and recipe.checkpoint.load_base is None:
            raise ConfigError(f"{name} needs a trained base, whose attention it reads; set checkpoint.load_base")
        if any(other.kind == "pretrain" for other in recipe.phases[i:]):
            raise ConfigError(f"{name} comes before a phase that pretrains, which would undo it; put it after")
        if phase.steps < 2:
            raise ConfigError(
                f"phases[{i}].steps must be >= 2 for calibrate, got {phase.steps}: one to learn, one to measure"
            )
        # The first token of a sample and its last ones, which few queries have asked for yet, are not learned from.
        length = recipe.data.sequence_length
        each = recipe.training.global_batch_size * max(
            length - 1 - max(recipe.dmc.local_window, length // UNSEEN_PART), 0
        )
        needed = recipe.model.hidden_size
        if phase.fit_steps * each < needed:
            remedy = f"set it to {math.ceil(20 * needed / each)} or more" if each else "use longer samples"
            raise ConfigError(
                f"phases[{i}].steps ({phase.steps}) of calibrate are too few: they learn from {phase.fit_steps * each} tokens "
                f"and the regression needs more than {needed} (model.hidden_size); {remedy}"
            )


def _check_window(dmc: DMCConfig, sequence_length: int) -> None:
    if dmc.local_window >= sequence_length:
        raise ConfigError(
            f"dmc.local_window ({dmc.local_window}) must be smaller than data.sequence_length ({sequence_length}): no "
            "decision would ever take effect"
        )
    kept = dmc.local_window + 1
    if kept * dmc.target_compression_ratio >= sequence_length:
        raise ConfigError(
            f"dmc.target_compression_ratio {dmc.target_compression_ratio:g} is out of reach: the first token and the "
            f"{dmc.local_window} of dmc.local_window are kept of every {sequence_length} (data.sequence_length); shorten the "
            f"window, lengthen the sequence{or_aim_below(sequence_length / kept)}"
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
    if distillation.top_k is not None and distillation.top_k > recipe.model.vocab_size:
        raise ConfigError(
            f"distillation.top_k must be <= model.vocab_size ({recipe.model.vocab_size}), got {distillation.top_k}"
        )
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
