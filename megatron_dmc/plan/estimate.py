"""The plan of a recipe on so many nodes: memory, work, traffic, time and checkpoints."""

from dataclasses import dataclass

from megatron_dmc.plan.cluster import Cluster, Layout, find_layout
from megatron_dmc.plan.communication import StepTime, Traffic, data_messages, stage_traffic, step_time
from megatron_dmc.plan.flops import Work, forward_share, step_work
from megatron_dmc.plan.memory import Footprints, StageMemory, stage_memory, whole_model
from megatron_dmc.recipe import PhaseConfig, Recipe


@dataclass(frozen=True)
class Plan:
    """What :func:`make_plan` found.

    Attributes:
        weights: of the whole model, its decisions included.
        learned: those of them that are trained.
        checkpoint_weights, checkpoint_full: bytes on the disk.
    """

    recipe: Recipe
    cluster: Cluster
    layout: Layout
    stages: list[StageMemory]
    weights: int
    learned: int
    work: Work
    traffic: Traffic
    time: StepTime
    checkpoint_weights: int
    checkpoint_full: int

    @property
    def fullest(self) -> StageMemory:
        return max(self.stages, key=lambda stage: stage.total)

    @property
    def fits(self) -> bool:
        return self.fullest.total <= self.cluster.gpu.usable

    @property
    def tokens_per_step(self) -> int:
        return self.recipe.training.global_batch_size * self.recipe.data.sequence_length

    def seconds(self, phase: PhaseConfig) -> float:
        """Of a whole phase."""
        share = forward_share(self.recipe) if phase.kind == "calibrate" else 1.0
        return phase.steps * share * self.time.total

    @property
    def run_seconds(self) -> float:
        return sum(map(self.seconds, self.recipe.phases))

    @property
    def mfu(self) -> float:
        """Of the whole step, waiting included."""
        return self.work.model / (self.time.total * self.cluster.gpus * self.cluster.gpu.peak_flops)


def make_plan(recipe: Recipe, cluster: Cluster, footprints: Footprints | None = None) -> Plan:
    """Plans a checked recipe; needs a process that is in no real world and sees no GPU.

    Args:
        footprints: those of plans made before, which this one may share.

    Raises:
        ConfigError: the layout does not fit the number of GPUs or the batch.
    """
    footprints = footprints or Footprints()
    layout = find_layout(recipe, cluster)
    stages = stage_memory(recipe, layout.world_size, footprints)
    weights, learned = whole_model(recipe)
    messages = [data_messages(recipe, stage, layout) for stage in stages]
    layers = [stage.layers for stage in stages]
    width = 2 if recipe.training.bf16 else 4
    saved = learned if recipe.trains_adapter else weights
    return Plan(
        recipe=recipe,
        cluster=cluster,
        layout=layout,
        stages=stages,
        weights=weights,
        learned=learned,
        work=step_work(recipe),
        traffic=stage_traffic(recipe, stages, layout, footprints),
        time=step_time(recipe, layers, messages, layout, cluster.gpu, cluster.mfu, footprints=footprints),
        checkpoint_weights=width * saved,
        checkpoint_full=width * saved + (12 if recipe.training.bf16 else 8) * learned,
    )
