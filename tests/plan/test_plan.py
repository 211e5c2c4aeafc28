"""The command: what fits, what does not and why, what to do, and which layouts it finds."""

import json
from collections.abc import Callable
from dataclasses import replace
from typing import Any

import pytest

from megatron_dmc.plan.gpus import GPU, GPUS
from megatron_dmc.recipe import load_recipe
from tests.support import planning
from tests.support.planning import FULL_70B, LLAMA2_70B, PAIRS_70B, tiny
from tests.support.toy import QUICKSTART_MODEL

Elsewhere = Callable[..., Any]


def test_llama2_70b_fits_as_its_recipe_says(elsewhere: Elsewhere) -> None:
    plan = elsewhere(planning.plan, load_recipe(LLAMA2_70B))
    assert plan.fits and plan.layout.replicas == 16
    assert plan.fullest.total < 0.5 * GPUS["h100"].usable
    # Parameters alone: the gradients and the optimizer are those of ten million decisions.
    assert plan.fullest.gradients + plan.fullest.optimizer < 0.01 * plan.fullest.parameters


def test_llama2_70b_trained_whole_in_pairs_of_samples_does_not_fit_without_a_pipeline(elsewhere: Elsewhere) -> None:
    plan, verdict, smaller = elsewhere(planning.refused, load_recipe(LLAMA2_70B, PAIRS_70B))
    assert not plan.fits
    assert "does not fit" in verdict and "most of it gradients 34.5 GB, activations 24.9 GB" in verdict
    assert "try training.recompute=full" in verdict and "\n" not in verdict
    assert smaller is not None and smaller.fits
    # On half the memory that is not enough: the pipeline has to become longer.
    cluster = replace(planning.H100, gpu=GPUS["a100-40"])
    batch = "training.global_batch_size=1024"
    plan, verdict, smaller = elsewhere(planning.refused, load_recipe(LLAMA2_70B, [*FULL_70B, batch]), cluster)
    assert "training.recompute=full parallel.pipeline_model_parallel_size=2" in verdict or "--search" in verdict


def test_search_finds_what_fits_and_the_fastest_first(elsewhere: Elsewhere) -> None:
    # A GPU on which the tiny model has to be divided: 140,000 parameters take 12 bytes each on one of two replicas.
    small = GPU("small", 2.0e6, 1e12, 1e11, 1e10)
    cluster = replace(planning.H100, nodes=1, gpus_per_node=2, gpu=small)
    recipe = tiny("training.global_batch_size=8")
    plans = elsewhere(planning.found, recipe, cluster, 3)
    assert plans and all(plan.fits for plan in plans)
    seconds = [plan.time.total for plan in plans]
    assert seconds == sorted(seconds)
    sizes = [
        (plan.recipe.parallel.tensor_model_parallel_size, plan.recipe.parallel.pipeline_model_parallel_size)
        for plan in plans
    ]
    assert len(set(sizes)) == len(sizes) and (1, 1) not in sizes
    # On a larger one, nothing is gained by dividing so small a model.
    (plan,) = elsewhere(planning.found, recipe, replace(cluster, gpu=replace(small, memory=1e9)), 1)
    parallel = plan.recipe.parallel
    assert (parallel.tensor_model_parallel_size, parallel.pipeline_model_parallel_size) == (1, 1)


def test_the_command_prints_everything(elsewhere: Elsewhere) -> None:
    arguments = ("plan", LLAMA2_70B, "--nodes", 1, *planning.TINY, "training.global_batch_size=16")
    status, out, err = elsewhere(planning.command, *arguments)
    assert (status, err) == (0, "")
    for word in ("parameters", "gradients", "optimizer", "activations", "model FLOPs", "GPU-hours", "checkpoints"):
        assert word in out
    assert out.splitlines()[-1].startswith("fits: ")
    # Plain when piped.
    assert "\x1b" not in out and "│" not in out and "━" not in out
    status, out, _ = elsewhere(planning.command, *arguments, "--json")
    values = json.loads(out)
    assert status == 0 and values["fits"]
    assert values["stages"][0]["total"] == sum(
        values["stages"][0][name]
        for name in ("parameters", "teacher", "gradients", "optimizer", "activations", "working")
    )
    assert [phase["tokens"] for phase in values["phases"]] == [700 * 16 * 128, 240 * 16 * 128]


@pytest.mark.parametrize("name", ["base", "neuron", "adapter"])
def test_other_recipes_can_be_planned(elsewhere: Elsewhere, name: str) -> None:
    folder = LLAMA2_70B.parents[1] / "quickstart"
    # All but the base take the model from it, and it is not here.
    status, out, err = elsewhere(
        *(planning.command, "plan", folder / f"{name}.yaml", f"model={QUICKSTART_MODEL}"),
        *("--nodes", 1, "--gpus-per-node", 1, "--gpu", "a100-40"),
    )
    assert (status, err) == (0, "") and "GPU-hours" in out


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (("--nodes", 0), "--nodes must be >= 1, got 0"),
        (("--nodes", 1, "--gpu", "h20"), "--gpu must be one of a100-40, a100-80, h100, h200, b200, got 'h20'"),
        (("--nodes", 1, "--mfu", 1.5), "--mfu must be <= 1, got 1.5"),
        (("--nodes", 1, "--gpus-per-node", 3), "must divide the number of GPUS (1 nodes x 3 = 3)"),
        (("--nodes", 16, "training.global_batch_size=3"), "must be a multiple of micro_batch_size (1) x data-parallel"),
        (("--nodes", 1, "training.banana=1"), "banana"),
    ],
    ids=["nodes", "gpu", "mfu", "GPUs", "batch", "recipe"],
)
def test_bad_input_is_one_line(elsewhere: Elsewhere, arguments: tuple[Any, ...], message: str) -> None:
    status, out, err = elsewhere(planning.command, "plan", LLAMA2_70B, *arguments)
    assert (status, out) == (2, "")
    assert message.lower() in err.lower() and err.count("\n") == 1


def test_what_does_not_fit_ends_in_1(elsewhere: Elsewhere) -> None:
    status, out, _ = elsewhere(planning.command, "plan", LLAMA2_70B, "--nodes", 16, *PAIRS_70B)
    assert status == 1
    assert out.splitlines()[-1].startswith("does not fit: ")
