"""Work and traffic against counts by hand, and the time they make."""

from collections.abc import Callable
from dataclasses import replace
from typing import Any

import pytest

from megatron_dmc.plan.communication import Layout, data_messages, step_time
from megatron_dmc.plan.flops import layer_weights, layer_work, output_work, step_work
from megatron_dmc.plan.gpus import GPUS
from megatron_dmc.plan.memory import Footprints, StageMemory
from megatron_dmc.recipe import ParallelConfig, load_recipe
from tests.support import planning
from tests.support.planning import LLAMA2_70B, tiny

Elsewhere = Callable[..., Any]


def test_weights_of_a_layer_are_the_real_models(elsewhere: Elsewhere) -> None:
    recipe = tiny()
    shapes = elsewhere(planning.real_shapes, recipe)
    matrices = [shape for name, shape in shapes.items() if "layers.0." in name and len(shape) == 2]
    assert layer_weights(recipe.model, projects=True) == sum(rows * columns for rows, columns in matrices)


def test_operations_of_a_step() -> None:
    recipe = load_recipe(LLAMA2_70B, [*planning.FULL_70B, "training.recompute=none"])
    seq, model = 4096, recipe.model
    # Six per weight and token, and causal attention: 4 s^2 / 2 per channel forward, three times that in all.
    weights = 80 * layer_weights(model, projects=True) + 32000 * 8192
    expected = 16 * (6 * weights * seq + 80 * 6 * seq**2 * 8192)
    assert step_work(recipe).model == pytest.approx(expected)
    assert step_work(recipe).recomputed == 0
    # A frozen weight has no gradient, a teacher is one more forward pass.
    adapter = load_recipe(LLAMA2_70B)
    forward = 2 * layer_weights(model, projects=True) * seq + 2 * seq**2 * 8192
    assert layer_work(adapter).model == pytest.approx(2 * forward + forward + 2 * seq**2 * 8192)
    assert layer_work(adapter).recomputed == 2 * seq**2 * 8192
    assert output_work(adapter).model == 3 * 2 * 8192 * 32000 * seq


@pytest.mark.parametrize(("train", "collectives"), [("full", 13), ("adapter", 11)])
def test_bytes_of_tensor_parallelism(elsewhere: Elsewhere, train: str, collectives: int) -> None:
    """Sequence parallel: gathered before qkv, decisions and the MLP, scattered after attention and the MLP; mirrored
    backward, and gathered once more for each weight that learns and reads a gathered input."""
    parallel = ("parallel.tensor_model_parallel_size=2", "parallel.sequence_parallel=true")
    recipe = tiny(f"training.train={train}", *parallel)
    one, two = (elsewhere(planning.footprint, recipe, "middle", count).sent["tensor"] for count in (1, 2))
    whole = 128 * 64 * 2
    assert two - one == collectives * whole / 2


def test_bytes_of_pipeline_and_data_parallelism(elsewhere: Elsewhere) -> None:
    recipe = tiny("parallel.pipeline_model_parallel_size=2", "training.global_batch_size=8")
    cluster = replace(planning.H100, nodes=1)
    plan = elsewhere(planning.plan, recipe, cluster)
    assert (plan.layout.replicas, plan.layout.micro_batches) == (4, 2)
    # Two micro-batches, 128 x 64 in bf16, one message forward and one back: a rank sends one of the two.
    assert plan.traffic.pipeline == 2 * 128 * 64 * 2
    largest = max(stage.weights for stage in plan.stages)
    assert plan.traffic.data == 3 / 4 * (4 + 2) * largest
    plain = replace(recipe, parallel=replace(recipe.parallel, use_distributed_optimizer=False))
    assert elsewhere(planning.plan, plain, cluster).traffic.data == 2 * 3 / 4 * 4 * largest
    assert plan.traffic.tensor == plan.traffic.context == 0
    # Embeddings of both ends: one all-reduce of their float32 gradient between two ranks.
    tied = replace(recipe, model=replace(recipe.model, share_embeddings_and_output_weights=True))
    assert elsewhere(planning.plan, tied, cluster).traffic.pipeline == plan.traffic.pipeline + 128 * 64 * 4


def test_time_of_a_step() -> None:
    """One rank per stage: nothing is sent inside a stage, and every number can be written down."""
    recipe = tiny("parallel.pipeline_model_parallel_size=2", "training.global_batch_size=8")
    layout = Layout(world_size=2, gpus_per_node=8, replicas=1, micro_batches=8)
    stage = StageMemory(0, (2,), 100, 200, 0, 400, 1200, 0, 0)
    messages = [data_messages(recipe, stage, layout)] * 2
    assert messages[0] == (0, 0)
    h100 = GPUS["h100"]
    time = step_time(recipe, [(2,), (2,)], messages, layout, h100, 0.5, footprints=Footprints())
    last = (layer_work(recipe) * 2 + output_work(recipe)).model
    assert time.compute == pytest.approx(8 * last / (0.5 * h100.peak_flops))
    assert time.pipeline == pytest.approx(8 * 128 * 64 * 2 / (0.8 * h100.link))
    assert time.bubble == pytest.approx((time.compute + time.pipeline) / 8)
    assert time.recompute == time.tensor == time.context == time.data == 0
    interleaved = replace(
        recipe, parallel=ParallelConfig(pipeline_model_parallel_size=2, virtual_pipeline_model_parallel_size=2)
    )
    halves = step_time(interleaved, [(1, 1), (1, 1)], messages, layout, h100, 0.5, footprints=Footprints())
    assert halves.bubble == pytest.approx(halves.compute / 16)
    assert halves.pipeline == 0
