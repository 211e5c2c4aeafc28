"""Bytes per rank of every pipeline stage: from the real model on the meta device, and one micro-batch through it."""

from dataclasses import dataclass, replace

from megatron_dmc.calibration.regression import Sums, gram_rows
from megatron_dmc.model.gpt import dmc_layers
from megatron_dmc.plan.footprint import Footprint, run_micro_batch
from megatron_dmc.plan.rank import META, fake_rank, stage_chunks
from megatron_dmc.plan.schedule import most_kept
from megatron_dmc.recipe import ParallelConfig, Recipe


@dataclass(frozen=True)
class StageMemory:
    """One rank of one pipeline stage. All but ``layers`` and ``weights`` in bytes.

    Attributes:
        layers: of each of its chunks (virtual stages).
        weights: parameters that this rank holds, a teacher's not counted.
        parameters, teacher: in training precision.
        gradients: the float32 buffer of what learns.
        optimizer: float32 main parameters and Adam's two moments, this replica's share.
        activations: kept for backward passes, of all micro-batches in flight; or, where that is more, the sums of
            ``calibrate``, which keeps none.
        working: on top of them at the worst moment of a micro-batch.
    """

    stage: int
    layers: tuple[int, ...]
    weights: int
    parameters: int
    teacher: int
    gradients: int
    optimizer: int
    activations: int
    working: int

    @property
    def parts(self) -> dict[str, int]:
        names = ("parameters", "teacher", "gradients", "optimizer", "activations", "working")
        return {name: getattr(self, name) for name in names}

    @property
    def total(self) -> int:
        return sum(self.parts.values())


def stage_memory(recipe: Recipe, world_size: int, footprints: "Footprints") -> list[StageMemory]:
    """Builds every pipeline stage of the layout as its rank would.

    Args:
        footprints: of this recipe's layers; a search shares them between its candidates.
    """
    training, parallel = recipe.training, recipe.parallel
    stages, replicas = parallel.pipeline_model_parallel_size, world_size // parallel.model_ranks
    micro_batches = training.global_batch_size // (training.micro_batch_size * replicas)
    shards = replicas * parallel.context_parallel_size if parallel.use_distributed_optimizer else 1
    found = []
    for stage in range(stages):
        with fake_rank(parallel, world_size, stage * world_size // stages):
            chunks, teachers = stage_chunks(recipe)
        parameters = [parameter for chunk in chunks for parameter in chunk.parameters()]
        learns = sum(parameter.numel() for parameter in parameters if parameter.requires_grad)
        layers = tuple(len(dmc_layers(chunk)) for chunk in chunks)
        ran = [
            footprints.chunk(recipe, kind, count)
            for kind, count in zip(chunk_kinds(recipe, stage), layers, strict=True)
        ]
        found.append(
            StageMemory(
                stage=stage,
                layers=layers,
                weights=sum(parameter.numel() for parameter in parameters),
                parameters=sum(parameter.nbytes for parameter in parameters),
                teacher=sum(parameter.nbytes for chunk in teachers or () for parameter in chunk.parameters()),
                gradients=4 * learns,
                # Trained in float32, the parameters are their own main copy.
                optimizer=-(-(12 if training.bf16 else 8) * learns // shards),
                activations=max(
                    most_kept([one.kept for one in ran], stage, stages, micro_batches),
                    _calibration_bytes(recipe, sum(layers)),
                ),
                working=max(one.working for one in ran),
            )
        )
    return found


def _calibration_bytes(recipe: Recipe, layers: int) -> int:
    """Of the sums of so many layers on one rank; 0 without a phase ``calibrate``."""
    if all(phase.kind != "calibrate" for phase in recipe.phases):
        return 0
    hidden_size, ranks = recipe.model.hidden_size, recipe.parallel.tensor_model_parallel_size
    sums = Sums.empty(hidden_size, recipe.model.num_query_groups // ranks, gram_rows(hidden_size, ranks), META)
    return layers * sum(each.nbytes for each in sums)


def whole_model(recipe: Recipe) -> tuple[int, int]:
    """Weights of the undivided model, and those of them that learn."""
    alone = replace(recipe, parallel=ParallelConfig())
    with fake_rank(alone.parallel, 1, 0):
        (chunk,), _ = stage_chunks(alone)
    counts = [(parameter.numel(), parameter.requires_grad) for parameter in chunk.parameters()]
    return sum(count for count, _ in counts), sum(count for count, learns in counts if learns)


def chunk_kinds(recipe: Recipe, stage: int) -> list[str]:
    """Where each of a stage's chunks stands in the model: ``first``, ``middle``, ``last``, or the ``only`` one."""
    parallel = recipe.parallel
    stages, chunks = parallel.pipeline_model_parallel_size, parallel.virtual_pipeline_model_parallel_size or 1
    end = stages * chunks - 1
    if end == 0:
        return ["only"]
    return [{0: "first", end: "last"}.get(stage + chunk * stages, "middle") for chunk in range(chunks)]


class Footprints:
    """What micro-batches leave on chunks of any length, measured on chunks of one and two layers and remembered."""

    def __init__(self) -> None:
        self._ran: dict[tuple[object, ...], Footprint] = {}

    def chunk(self, recipe: Recipe, kind: str, layers: int) -> Footprint:
        """Layers are alike, wherever they are: each adds what a second one adds."""
        one = self._run(recipe, kind, 1)
        if layers == 1:
            return one
        alone, two = self._run(recipe, "only", 1), self._run(recipe, "only", 2)
        more = layers - 1
        return Footprint(
            kept=one.kept + more * (two.kept - alone.kept),
            working=one.working,
            sent={name: size + more * (two.sent[name] - alone.sent[name]) for name, size in one.sent.items()},
        )

    def sent(self, recipe: Recipe, kind: str, layers: int) -> dict[str, float]:
        """:attr:`Footprint.sent`, which grows with the micro-batch and nothing else of it."""
        parallel, training = recipe.parallel, recipe.training
        if parallel.tensor_model_parallel_size == parallel.context_parallel_size == 1:
            return {}
        recompute = training.recompute
        if recompute == "selective" and parallel.context_parallel_size == 1:
            recompute = "none"  # attention itself sends nothing then
        single = replace(recipe, training=replace(training, micro_batch_size=1, recompute=recompute))
        sent = self.chunk(single, kind, layers).sent
        return {name: training.micro_batch_size * size for name, size in sent.items()}

    def _run(self, recipe: Recipe, kind: str, layers: int) -> Footprint:
        """The first, middle or last of three stages with so many layers each."""
        stages = 1 if kind == "only" else 3
        probe = replace(
            recipe,
            model=replace(recipe.model, num_layers=stages * layers),
            parallel=replace(
                recipe.parallel, pipeline_model_parallel_size=stages, virtual_pipeline_model_parallel_size=None
            ),
        )
        training, parallel = probe.training, probe.parallel
        key = (
            *(kind, layers, probe.model, probe.dmc, probe.merges, probe.distills, probe.teacher),
            *(probe.data.sequence_length, training.micro_batch_size, training.train, training.bf16, training.recompute),
            *(parallel.tensor_model_parallel_size, parallel.context_parallel_size, parallel.cp_comm_type),
            *(parallel.sequence_parallel, probe.distillation.top_k, probe.distillation.direction),
        )
        if key not in self._ran:
            ranks = parallel.tensor_model_parallel_size * parallel.context_parallel_size
            stage = {"only": 0, "first": 0, "middle": 1, "last": 2}[kind]
            with fake_rank(parallel, stages * ranks, stage * ranks):
                chunks, teachers = stage_chunks(probe)
                teacher = None if teachers is None else teachers[0]
                self._ran[key] = run_micro_batch(probe, chunks[0], teacher, META, receives=stage > 0)
        return self._ran[key]
