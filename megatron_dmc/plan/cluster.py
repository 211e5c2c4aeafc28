"""What a run would be started on, and how it is divided there. Nothing here needs torch: bad input is refused at once."""

from dataclasses import dataclass

from megatron_dmc.config import ConfigError, Range
from megatron_dmc.plan.gpus import GPU
from megatron_dmc.recipe import Recipe, check_batch


@dataclass(frozen=True)
class Cluster:
    """What a run would be started on.

    Attributes:
        mfu: part of ``gpu.peak_flops`` that the model's operations reach while nothing waits.
    """

    nodes: int
    gpus_per_node: int
    gpu: GPU
    mfu: float

    def __post_init__(self) -> None:
        for name, value in (("--nodes", self.nodes), ("--gpus-per-node", self.gpus_per_node)):
            Range(1, 1_000_000).check(name, value)
        Range(1e-3, 1).check("--mfu", self.mfu)

    @property
    def gpus(self) -> int:
        return self.nodes * self.gpus_per_node


@dataclass(frozen=True)
class Layout:
    """Sizes of a run: ranks, nodes, and how often each rank's model runs in a step."""

    world_size: int
    gpus_per_node: int
    replicas: int
    micro_batches: int


def find_layout(recipe: Recipe, cluster: Cluster) -> Layout:
    """Raises ConfigError for a layout that the GPUs or the batch cannot be divided into."""
    model_ranks = recipe.parallel.model_ranks
    if cluster.gpus % model_ranks:
        raise ConfigError(
            f"parallel: tensor x pipeline x context = {model_ranks} must divide the number of GPUs ({cluster.nodes} nodes x "
            f"{cluster.gpus_per_node} = {cluster.gpus}); change --nodes, or parallel"
        )
    replicas = cluster.gpus // model_ranks
    check_batch(recipe, replicas)
    micro_batches = recipe.training.global_batch_size // (recipe.training.micro_batch_size * replicas)
    return Layout(cluster.gpus, cluster.gpus_per_node, replicas, micro_batches)
