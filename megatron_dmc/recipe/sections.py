"""The typed sections of a recipe: every setting of a run, with its type, its default and its meaning."""

from dataclasses import dataclass, field
from typing import Any, Literal

from omegaconf import MISSING, OmegaConf

from megatron_dmc.config import DMCConfig
from megatron_dmc.model.model_config import ModelConfig

PhaseKind = Literal["pretrain", "zero_out", "compress", "solidify"]


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
    heatmap_interval: int = 100  # steps; a heatmap waits for the next logged step, the last step has one; 0: none
    eval_interval: int = 0  # steps; 0: only before the first step and after the last
    eval_samples: int = 32
    progress_bar: bool = True


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
