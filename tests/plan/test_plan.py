"""The command: what fits, what does not and why, what to do, and which layouts it finds."""

import json
import re
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest

from megatron_dmc.plan.gpus import GPU, GPUS
from megatron_dmc.plan.report import _duration
from megatron_dmc.recipe import load_recipe
from tests.support import planning
from tests.support.planning import FULL_70B, LLAMA2_70B, PAIRS_70B, tiny
from tests.support.processes import ROOT
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
    first, *_, last = out.splitlines()
    assert re.fullmatch(
        r"fits on 8 x H100 80 GB \(1 node\): needs \d+\.\d GB of 72\.0 GB per GPU; would take [a-z0-9 ]+, \d+\.\d GPU-hours",
        first,
    )
    assert last.startswith("fits: ")
    # What this layout has none of takes no line.
    assert "context parallel" not in out and "bubble" not in out
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


def test_rows_that_pad_the_bases_vocabulary_are_announced(elsewhere: Elsewhere, tmp_path: Path) -> None:
    recipe = load_recipe(ROOT / "examples/quickstart/base.yaml").to_dict()
    recipe["model"]["vocab_size"] = 1001
    description = {
        "format_version": 1,
        "kind": "weights",
        "recipe": recipe,
        "step": 0,
        "consumed_samples": 0,
        "phase": 0,
    }
    arguments = [ROOT / "examples/quickstart/adapter.yaml", f"checkpoint.load_base={tmp_path}", "--nodes", 1]
    arguments += ["--gpus-per-node", 1, "model.vocab_size=1024"]
    line = "1024 rows, 23 more than the base's 1001 (each starts as the mean of those); an export has 1001"
    (tmp_path / "dmc.json").write_text(json.dumps(description))
    status, out, err = elsewhere(planning.command, "plan", *arguments)
    assert (status, err) == (0, "") and f"\nvocabulary: {line}\n" in out
    # As a conversion with padding leaves it.
    recipe["model"]["vocab_size"] = 1024
    (tmp_path / "dmc.json").write_text(json.dumps(description | {"vocabulary": 1001}))
    status, out, _ = elsewhere(planning.command, "plan", *arguments, "--json")
    assert json.loads(out)["vocabulary"] == line
    (tmp_path / "dmc.json").write_text(json.dumps(description))
    status, out, _ = elsewhere(planning.command, "plan", *arguments)
    assert status == 0 and "vocabulary" not in out


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
    first, *_, last = out.splitlines()
    assert first.startswith("does not fit on 128 x H100 80 GB (16 nodes of 8): needs ") and last.startswith(
        "does not fit: "
    )
    # A share above 100 % stands below what it is a share of.
    head, row = (next(line for line in out.splitlines() if line.startswith(word)) for word in ("stage ", "0 "))
    assert head.endswith("of 72.0 GB") and re.search(r" 1\d\d%$", row)


@pytest.mark.parametrize(
    ("seconds", "words"),
    [
        (0.02, "under 1 s"),
        (119, "119 s"),
        (856, "14 min"),
        (7199, "120 min"),
        (7200, "2.0 hours"),
        (2687040, "31.1 days"),
    ],
)
def test_times_have_a_unit_that_suits(seconds: float, words: str) -> None:
    assert _duration(seconds) == words
