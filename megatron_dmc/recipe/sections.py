"""The typed sections of a recipe: every setting of a run, with its type, its default and its meaning."""

from dataclasses import asdict, dataclass, field
from typing import Annotated, Any, Literal

from megatron_dmc.config import Count, CountOrZero, DMCConfig, Range, Ratio
from megatron_dmc.model.model_config import MISSING, ModelConfig

PhaseKind = Literal["pretrain", "zero_out", "calibrate", "compress", "solidify"]
Seed = Annotated[int, Range(0, 2**32 - 1)]
# A rate that is far too high ends in an error of the training itself, which says what to lower. One that is far too low ends
# in nothing: a float32 weight of 1e-4 does not change by a step of 1e-12.
HIGHEST_RATE = 1e30
# Of a mean over steps; at 1 Adam would divide by zero.
Decay = Annotated[float, Range(0, 0.999999)]
Processes = Annotated[int, Range(1, 1_000_000)]


# Tokens in the last quarter of a text have been asked for by few queries yet: calibrate does not learn from them.
UNSEEN_PART = 4

# The comment of a setting, after it or above it, is its line in docs/settings.md. A type says what may be written.


@dataclass(frozen=True)
class DataConfig:
    """Text to train on and to hold out, as megatron-core indexed datasets."""

    train: list[str] = MISSING  # path prefixes of .bin/.idx pairs
    valid: list[str] = field(default_factory=list)  # path prefixes of held-out .bin/.idx pairs; []: no evaluation
    tokenizer: str = MISSING  # a folder with tokenizer.json
    sequence_length: Annotated[int, Range(2, 2**22)] = MISSING  # tokens of a sample
    cache: str = MISSING  # a folder for the dataset indices
    seed: Seed = 1234  # of the order of the samples
    reset_at_documents: bool = False  # positions, attention and merging begin anew at every packed document
    # share of the training samples that are a text twice, which trains recall; null: 1/3 if training.train is adapter, else 0
    repeat_fraction: Annotated[float, Range(0, 1)] | None = None


@dataclass(frozen=True)
class PhaseConfig:
    """One stretch of the run with its own optimizer state and learning-rate schedule (algorithm.md section 5)."""

    # pretrain: no decisions. zero_out (neuron only): frees the channel that decisions are read from. calibrate (projection
    # only): sets the decisions from the base's attention, without training, at the ratio that the next phase starts from.
    # compress: the target ratio rises to dmc.target_compression_ratio. solidify: it stays there.
    kind: PhaseKind = MISSING
    steps: Count = MISSING  # global batches: of calibrate the last fifth only measures, of the others optimizer steps
    lr: Annotated[float, Range(1e-12, HIGHEST_RATE)] = 3e-5  # peak learning rate
    min_lr: Annotated[float, Range(0, HIGHEST_RATE)] | None = None  # learning rate at the end; null: lr (constant)
    lr_decay_style: Literal["constant", "linear", "cosine"] = "constant"  # from lr to min_lr, after the warmup
    lr_warmup_steps: CountOrZero = 0  # steps over which the learning rate rises from 0 to lr
    start_compression_ratio: Ratio = 1.0  # of kind compress: the target rises from here

    @property
    def merges(self) -> bool:
        """Whether decisions are made and take effect in its steps."""
        return self.kind in ("compress", "solidify")

    @property
    def decides(self) -> bool:
        """Whether the model has decisions that mean something after it."""
        return self.merges or self.kind == "calibrate"

    @property
    def fit_steps(self) -> int:
        """Of a ``calibrate`` phase: the steps whose text is learned from. On that of the others the threshold is chosen."""
        return self.steps - max(1, self.steps // 5)


@dataclass(frozen=True)
class DistillationConfig:
    """A loss that the base model teaches: (1 - weight) LM loss + weight KL, see ``distillation_loss``."""

    weight: Annotated[float, Range(0, 1)] = 0.0  # 0: no teacher; 1: only the teacher
    # A base's checkpoint folder; null: checkpoint.load_base. An adapter is taught by its own base: null.
    teacher: str | None = None
    # forward: KL(teacher || student); reverse: KL(student || teacher)
    direction: Literal["forward", "reverse"] = "forward"
    temperature: Annotated[float, Range(1e-3, 1000)] = 1.0  # divides the logits of both
    top_k: Count | None = None  # of the teacher's likeliest tokens; null: the whole vocabulary


@dataclass(frozen=True)
class TrainingConfig:
    """What is trained, and the optimizer (Adam)."""

    train: Literal["full", "adapter"] = "full"  # adapter: the base is frozen, only the decisions' projection learns
    micro_batch_size: Annotated[int, Range(1, 2**16)] = 1  # samples that a replica of the model computes at a time
    global_batch_size: Annotated[int, Range(1, 2**20)] = MISSING  # samples of one optimizer step, over all replicas
    bf16: bool = True  # compute in bfloat16; the optimizer keeps float32 weights
    fp8: Literal["e4m3", "hybrid"] | None = None  # of the linear layers, by Transformer Engine; hybrid: e5m2 gradients
    seed: Seed = 1234  # of initial weights
    weight_decay: Annotated[float, Range(0, 1000)] = 0.1  # AdamW's
    adam_beta1: Decay = 0.9  # decay of the gradient's mean
    adam_beta2: Decay = 0.95  # decay of the gradient's mean square
    adam_eps: Annotated[float, Range(1e-30, 1)] = 1e-8  # Adam's epsilon
    # largest norm of the gradient; 0: no limit. What is cut far below adam_eps trains nothing.
    clip_grad: Annotated[float, Range(1e-6, 1e30, or_zero=True)] = 1.0
    # Activations computed again in the backward pass, which saves memory. selective: attention's; full: every layer's.
    recompute: Literal["none", "selective", "full"] = "none"
    # What computes linear layers and norms; auto: Transformer Engine where it is installed, else megatron-core's own.
    transformer_impl: Literal["auto", "local", "transformer_engine"] = "auto"
    exit_after_steps: Count | None = None  # stop (and save) after this many steps of this process


@dataclass(frozen=True)
class ParallelConfig:
    """How the model is divided among processes. What is left of their number are data-parallel replicas."""

    tensor_model_parallel_size: Processes = 1  # processes that share every layer
    pipeline_model_parallel_size: Processes = 1  # processes that hold a part of the layers each
    virtual_pipeline_model_parallel_size: Count | None = None  # interleaved stages of each process; null: one
    context_parallel_size: Processes = 1  # processes that share the tokens of a sequence
    cp_comm_type: Literal["all_gather", "a2a"] = (
        "all_gather"  # exchange under context parallelism; a2a: heads for tokens
    )
    sequence_parallel: bool = False  # tensor-parallel processes also divide norms and residuals, by tokens
    use_distributed_optimizer: bool = True  # replicas share the optimizer's state
    overlap: bool = False  # gradient reduction during the backward pass, parameter gathering during the forward pass

    @property
    def model_ranks(self) -> int:
        """Processes that share one replica of the model and one sample."""
        return self.tensor_model_parallel_size * self.pipeline_model_parallel_size * self.context_parallel_size


@dataclass(frozen=True)
class CheckpointConfig:
    """Where a run starts from, and what it saves."""

    directory: str = MISSING  # the run's own folder of checkpoints; a run that finds its own there resumes
    # A checkpoint folder of this project: the run starts from its weights, and takes the model section from it.
    load_base: str | None = None
    save_interval: CountOrZero = 500  # steps between full checkpoints; 0: only at the end
    keep_last: Count = 2  # full checkpoints kept
    async_save: bool = False  # written while training goes on, from a copy in the host's memory
    save_every_integer_ratio: bool = True  # weights as cr_2, cr_3, ... when the target ratio reaches them


@dataclass(frozen=True)
class MonitorConfig:
    """What a run shows while it goes on."""

    tensorboard: str | None = None  # a folder for TensorBoard's files; null: none are written
    log_interval: Count = 10  # steps between points of TensorBoard's curves
    # steps; a heatmap waits for the next logged step, the last step has one; 0: none
    heatmap_interval: CountOrZero = 100
    eval_interval: CountOrZero = 0  # steps between evaluations; 0: only before the first step and after the last
    # samples of data.valid in an evaluation, in whole global batches; one at least
    eval_samples: Annotated[int, Range(0, 2**20)] = 32
    # nats per token; a run warns where its loss on repeated text lies further above the base's; null: never
    recall_limit: Annotated[float, Range(0, 1000)] | None = 0.25
    progress_bar: bool = True  # what a run says: bar or lines, banner, held-out losses; false: only warnings


@dataclass(frozen=True)
class Recipe:
    """Everything a run is. Read one with :func:`~megatron_dmc.recipe.load_recipe`."""

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
    def repeat_fraction(self) -> float:
        """How many of the training samples are a text twice."""
        if self.data.repeat_fraction is None:
            return 1 / 3 if self.trains_adapter else 0.0
        return self.data.repeat_fraction

    @property
    def distills(self) -> bool:
        return self.distillation.weight > 0

    @property
    def teacher(self) -> str | None:
        """The checkpoint of a second, frozen model that teaches; None where none is needed: an adapter's base is its own."""
        if not self.distills or self.trains_adapter:
            return None
        return self.distillation.teacher or self.checkpoint.load_base

    def start_ratio(self, phase: int) -> float:
        """The compression ratio that the phase after a ``calibrate`` phase starts from."""
        following = self.phases[phase + 1 :]
        if following and following[0].kind == "compress":
            return following[0].start_compression_ratio
        return self.dmc.target_compression_ratio

    @property
    def total_steps(self) -> int:
        return sum(phase.steps for phase in self.phases)

    def to_dict(self) -> dict[str, Any]:
        """Plain nested values; ``recipe_from_dict`` reads them back."""
        return asdict(self)
