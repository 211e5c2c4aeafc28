"""A run's recipe: YAML over typed dataclasses, dotted overrides, and every check that needs no model."""

import math
from collections.abc import Sequence
from dataclasses import dataclass, field, is_dataclass
from pathlib import Path
from typing import Any, Literal, get_origin, get_type_hints

from omegaconf import MISSING, OmegaConf
from omegaconf.errors import OmegaConfBaseException

from megatron_dmc.config import ConfigError, DMCConfig
from megatron_dmc.model.model_config import ModelConfig

PhaseKind = Literal["pretrain", "zero_out", "compress", "solidify"]

# megatron-core holds an index of all of a run's samples in memory.
MOST_SAMPLES = 2**31 - 1
# What the sizes of an FP8 matrix product must be multiples of.
FP8_MULTIPLE = 16


@dataclass(frozen=True)
class DataConfig:
    """Text to train on and to hold out, as megatron-core indexed datasets."""

    train: list[str] = MISSING  # path prefixes of .bin/.idx pairs
    valid: list[str] = field(default_factory=list)
    tokenizer: str = MISSING  # a folder with tokenizer.json
    sequence_length: int = MISSING
    cache: str = MISSING  # a folder for the dataset indices
    seed: int = 1234
    reset_at_documents: bool = False  # positions, attention and merging begin anew at every packed document


@dataclass(frozen=True)
class PhaseConfig:
    """One stretch of the run with its own optimizer state and learning-rate schedule (algorithm.md section 5)."""

    kind: PhaseKind = MISSING
    steps: int = MISSING
    lr: float = 3e-5
    min_lr: float | None = None  # None: lr (constant)
    lr_decay_style: Literal["constant", "linear", "cosine"] = "constant"
    lr_warmup_steps: int = 0
    start_compression_ratio: float = 1.0  # of kind compress: the target rises from here

    @property
    def merges(self) -> bool:
        """Whether decisions are made and carried out."""
        return self.kind in ("compress", "solidify")


@dataclass(frozen=True)
class DistillationConfig:
    """A loss that the base model teaches: (1 - weight) LM loss + weight KL, see ``distillation_loss``."""

    weight: float = 0.0  # 0: no teacher; 1: the teacher alone
    teacher: str | None = None  # a base's checkpoint folder; None: checkpoint.load_base. An adapter's is its own base.
    direction: Literal["forward", "reverse"] = "forward"
    temperature: float = 1.0
    top_k: int | None = None  # of the teacher's likeliest tokens; None: the whole vocabulary


@dataclass(frozen=True)
class TrainingConfig:
    train: Literal["full", "adapter"] = "full"  # adapter: the base is frozen, only the decisions' projection learns
    micro_batch_size: int = 1
    global_batch_size: int = MISSING
    bf16: bool = True
    fp8: Literal["e4m3", "hybrid"] | None = None  # of the linear layers, by Transformer Engine; hybrid: e5m2 gradients
    seed: int = 1234
    weight_decay: float = 0.1
    adam_beta1: float = 0.9
    adam_beta2: float = 0.95
    adam_eps: float = 1e-8
    clip_grad: float = 1.0
    recompute: Literal["none", "selective", "full"] = "none"
    transformer_impl: Literal["auto", "local", "transformer_engine"] = "auto"
    exit_after_steps: int | None = None  # stop (and save) after this many steps of this process


@dataclass(frozen=True)
class ParallelConfig:
    tensor_model_parallel_size: int = 1
    pipeline_model_parallel_size: int = 1
    virtual_pipeline_model_parallel_size: int | None = None
    context_parallel_size: int = 1
    cp_comm_type: Literal["all_gather", "a2a"] = "all_gather"  # see context_parallel_attention
    sequence_parallel: bool = False
    use_distributed_optimizer: bool = True
    overlap: bool = False  # gradient reduction and parameter gathering behind the backward and forward pass

    @property
    def model_ranks(self) -> int:
        """Processes that share one replica of the model and one sample."""
        return self.tensor_model_parallel_size * self.pipeline_model_parallel_size * self.context_parallel_size


@dataclass(frozen=True)
class CheckpointConfig:
    directory: str = MISSING
    load_base: str | None = None  # weights-only start: a checkpoint folder of this project
    save_interval: int = 500  # steps between full checkpoints; 0: only at the end
    keep_last: int = 2  # full checkpoints kept
    async_save: bool = False  # written while training goes on, from a copy in the host's memory
    save_every_integer_ratio: bool = True


@dataclass(frozen=True)
class MonitorConfig:
    tensorboard: str | None = None
    log_interval: int = 10
    heatmap_interval: int = 100  # steps; a heatmap waits for the next logged step; 0: none
    eval_interval: int = 0  # 0: only at the end
    eval_samples: int = 32
    progress_bar: bool = True


@dataclass(frozen=True)
class Recipe:
    """Everything a run is. Read one with :func:`load_recipe`."""

    model: ModelConfig = field(default_factory=ModelConfig)
    dmc: DMCConfig = field(default_factory=DMCConfig)
    data: DataConfig = field(default_factory=DataConfig)
    phases: list[PhaseConfig] = field(default_factory=list)
    training: TrainingConfig = field(default_factory=TrainingConfig)
    distillation: DistillationConfig = field(default_factory=DistillationConfig)
    parallel: ParallelConfig = field(default_factory=ParallelConfig)
    checkpoint: CheckpointConfig = field(default_factory=CheckpointConfig)
    monitor: MonitorConfig = field(default_factory=MonitorConfig)

    @property
    def merges(self) -> bool:
        """Whether the run's model has decisions: any phase beyond pretraining."""
        return any(phase.kind != "pretrain" for phase in self.phases)

    @property
    def trains_adapter(self) -> bool:
        """Whether the base is frozen."""
        return self.training.train == "adapter"

    @property
    def distills(self) -> bool:
        return self.distillation.weight > 0

    @property
    def teacher(self) -> str | None:
        """The checkpoint of a second, frozen model that teaches; None where none is needed: an adapter's base is its own."""
        if not self.distills or self.trains_adapter:
            return None
        return self.distillation.teacher or self.checkpoint.load_base

    @property
    def total_steps(self) -> int:
        return sum(phase.steps for phase in self.phases)

    def to_dict(self) -> dict[str, Any]:
        """Plain nested values; ``recipe_from_dict`` reads them back."""
        return OmegaConf.to_container(OmegaConf.structured(self))  # type: ignore[return-value]


def load_recipe(path: str | Path, overrides: Sequence[str] = ()) -> Recipe:
    """Reads a YAML recipe and ``section.field=value`` overrides, checks all of it.

    Raises:
        ConfigError: one line: the file or field, the value, and what to do.
    """
    path = Path(path)
    if not path.is_file():
        raise ConfigError(f"recipe {path} does not exist; examples/ holds recipes to start from")
    try:
        values = OmegaConf.load(path)
    except Exception as error:  # PyYAML, OmegaConf and the file system each have errors of their own
        raise ConfigError(f"recipe {path} is not YAML: {_one_line(error)}") from None
    if not OmegaConf.is_dict(values):
        raise ConfigError(f"recipe {path} must hold sections (model, data, phases, ...), not a {type(values).__name__}")
    try:
        for override in overrides:
            _apply(values, override)
        return _build(values)
    except ConfigError as error:
        raise ConfigError(f"recipe {path}: {error}") from None


def _apply(values: Any, override: str) -> None:
    """Sets ``section.field=value``; a number in the path counts list entries: ``phases.0.steps=100``."""
    key, equals, text = override.partition("=")
    if not equals or not key:
        raise ConfigError(f"override {override!r} must read section.field=value")
    try:
        OmegaConf.update(values, key, OmegaConf.from_dotlist([f"value={text}"]).value, force_add=True)
    except Exception as error:  # PyYAML and OmegaConf each have errors of their own
        raise ConfigError(f"override {override!r}: {_one_line(error)}") from None


def recipe_from_dict(values: dict[str, Any]) -> Recipe:
    """The recipe that a checkpoint was written with; raises ConfigError as :func:`load_recipe` does."""
    return _build(OmegaConf.create(values))


def _build(values: Any) -> Recipe:
    _check_shape(OmegaConf.to_container(values, resolve=False), Recipe)
    try:
        recipe = OmegaConf.to_object(OmegaConf.merge(OmegaConf.structured(Recipe), values))
    except ConfigError as error:
        # Only DMCConfig checks itself while it is built.
        raise ConfigError(f"dmc.{error}") from None
    except (OmegaConfBaseException, TypeError, ValueError) as error:
        key = getattr(error, "full_key", None)
        raise ConfigError(f"{key}: {_one_line(error)}" if key else _one_line(error)) from None
    assert isinstance(recipe, Recipe)
    check_recipe(recipe)
    return recipe


def _check_shape(values: Any, section: Any, place: str = "") -> None:
    """Sections hold settings, and lists are lists: OmegaConf's own words for what is not name no field."""
    for name, kind in get_type_hints(section).items():
        value = values.get(name)
        if name not in values or (isinstance(value, str) and "${" in value):
            continue
        if is_dataclass(kind):
            if not isinstance(value, dict):
                raise ConfigError(f"{name} must hold settings (name: value), got {value!r}")
            _check_shape(value, kind, f"{name}.")
        elif get_origin(kind) is list and not isinstance(value, list) and value != MISSING:
            raise ConfigError(f"{place}{name} must be a list, got {value!r}; write [a, b], for one [a]")


def _one_line(error: BaseException) -> str:
    return str(error).split("\n", maxsplit=1)[0]


def check_recipe(recipe: Recipe) -> None:
    """All checks of a run's settings against one another, before anything is built.

    Raises:
        ConfigError: the first setting that cannot work, with the remedy.
    """
    model, training, parallel, phases = recipe.model, recipe.training, recipe.parallel, recipe.phases
    model.check()
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
    _check_parallel(recipe)
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


def _check_fp8(recipe: Recipe) -> None:
    """All but what the machine has, see build.check_machine."""
    model, training, parallel = recipe.model, recipe.training, recipe.parallel
    if not training.bf16:
        raise ConfigError(f"training.fp8 {training.fp8} needs training.bf16 true: what is not FP8 is bfloat16")
    if training.transformer_impl == "local":
        raise ConfigError(
            f"training.fp8 {training.fp8} needs Transformer Engine; set training.transformer_impl to auto, or fp8 to null"
        )
    if recipe.merges and recipe.dmc.decision_source == "neuron":
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


def _check_base(recipe: Recipe) -> None:
    """What an adapter and a teacher need."""
    distillation, base = recipe.distillation, recipe.checkpoint.load_base
    if recipe.trains_adapter:
        if recipe.dmc.decision_source != "projection":
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


def _check_window(dmc: DMCConfig, sequence_length: int) -> None:
    if dmc.local_window >= sequence_length:
        raise ConfigError(
            f"dmc.local_window ({dmc.local_window}) must be smaller than data.sequence_length ({sequence_length}): no "
            "decision would ever be carried out"
        )
    if dmc.local_window * dmc.target_compression_ratio >= sequence_length:
        raise ConfigError(
            f"dmc.target_compression_ratio {dmc.target_compression_ratio:g} is out of reach: the {dmc.local_window} tokens of "
            f"dmc.local_window are kept of every {sequence_length} (data.sequence_length); shorten the window, lengthen "
            f"the sequence, or aim below {sequence_length / dmc.local_window:g}"
        )


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


def _check_parallel(recipe: Recipe) -> None:
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
            f"pad the vocabulary, or {_tensor_sizes(recipe)}"
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
        if phase.kind == "zero_out" and dmc.decision_source != "neuron":
            raise ConfigError(
                f"phases[{i}].kind zero_out is only for dmc.decision_source neuron: projection takes nothing from the "
                "model; remove the phase"
            )
