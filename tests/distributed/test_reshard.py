"""A checkpoint of any layout loads in any other: the same state to the last bit, and the run continues as if never stopped.

Only what is selected is run.
"""

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch

from tests.support.processes import run
from tests.support.tensors import assert_same_tensors, checkpoint_tensors
from tests.support.toy import recipe_values, scalars, write_recipe, write_text

pytestmark = [pytest.mark.distributed, pytest.mark.usefixtures("one_process")]

PLAIN = "parallel.use_distributed_optimizer=false"
TENSOR, PIPELINE = "parallel.tensor_model_parallel_size=2", "parallel.pipeline_model_parallel_size=2"
# Processes, and settings over the recipe's.
LAYOUTS: dict[str, tuple[int, list[str]]] = {
    "one": (1, []),
    "one-plain": (1, [PLAIN]),
    "dp2": (2, ["parallel.overlap=true"]),
    "dp2-plain": (2, [PLAIN]),
    "tp2": (2, [TENSOR, "parallel.sequence_parallel=true"]),
    "tp2-plain": (2, [TENSOR, PLAIN]),
    "pp2": (2, [PIPELINE]),
    "pp2-vpp2": (2, [PIPELINE, "parallel.virtual_pipeline_model_parallel_size=2"]),
    "cp2": (2, ["parallel.context_parallel_size=2"]),
    "dp4": (4, []),
    "tp2-pp2": (4, [TENSOR, PIPELINE]),
}
KINDS = {
    "full": [],
    "bf16": ["training.bf16=true"],
    "adapter": ["training.train=adapter", "dmc.local_window=4", "distillation.weight=0.5"],
    "tied": ["model.share_embeddings_and_output_weights=true", "checkpoint.load_base=null"],
}
# (kind, layout that saves after 4 of 6 steps, layout that resumes)
RESUMED = [
    ("full", "one", "tp2"),
    ("full", "tp2", "pp2-vpp2"),
    ("full", "dp2", "one"),
    ("full", "pp2-vpp2", "dp2-plain"),
    ("full", "cp2", "tp2"),
    ("full", "tp2", "cp2"),
    ("full", "dp4", "tp2-pp2"),
    ("full", "tp2-pp2", "dp4"),
    ("bf16", "dp2", "pp2"),
    ("adapter", "pp2", "one"),
]
SAME = [("full", "pp2-vpp2"), ("full", "cp2"), ("full", "tp2-pp2"), ("bf16", "dp2")]
# Nothing is trained after the load: what is saved again must be what was loaded.
SAVED_AGAIN = [
    *RESUMED,
    ("full", "one-plain", "dp2"),
    ("bf16", "dp2", "tp2-plain"),
    ("bf16", "tp2-plain", "one"),
    ("bf16", "dp4", "tp2-pp2"),
    ("adapter", "pp2", "dp2"),
    ("tied", "pp2", "dp2"),
]
TAGS = (
    *("loss/lm", "compression_ratio/noisy", "compression_ratio/noise_free"),
    *("train/gradient_norm", "train/learning_rate"),
)
TOLERANCE = {"full": 2e-5, "adapter": 2e-5, "bf16": 5e-3}


def recipe(folder: Path, name: str) -> str:
    phases = [
        {"kind": "compress", "steps": 2, "lr": 1e-3, "start_compression_ratio": 2.0},
        {"kind": "solidify", "steps": 4, "lr": 1e-3, "min_lr": 1e-4, "lr_decay_style": "cosine"},
    ]
    values = recipe_values(folder, folder / name, phases, temperature=0.5, decision_bias=0.3)
    values["data"]["sequence_length"] = 32
    values["model"] |= {"num_layers": 4, "init_method_std": 0.1}
    # In the first step all omegas are equal and cancel: the gradient of their bias is nothing but rounding, 1e-9 of either
    # sign, another in every layout. With Adam's usual eps of 1e-8 it would move the bias by up to 1e-4, and five steps later
    # the gradient norms of two layouts would differ by 3e-5, in runs that were never stopped as well.
    values["training"] |= {"micro_batch_size": 1, "adam_eps": 1e-5}
    values["checkpoint"] |= {"load_base": str(folder / "base" / "checkpoints" / "final"), "keep_last": 9}
    values["monitor"] |= {"eval_samples": 0, "heatmap_interval": 0}
    values["data"]["valid"] = []
    return str(write_recipe(folder / name, values))


def job(folder: Path, kind: str, *path: str, stops: bool = False, only_saves: bool = False) -> dict[str, Any]:
    """A job that runs a kind in the last layout of a path, and resumes from what the layout before it saved."""
    name = "-to-".join((kind, *path)) + ("-again" if only_saves else "-whole" if not stops and len(path) == 1 else "")
    processes, overrides = LAYOUTS[path[-1]]
    overrides = KINDS[kind] + overrides + (["training.exit_after_steps=4"] if stops else [])
    return {
        "recipe": recipe(folder, name),
        "overrides": overrides,
        "processes": processes,
        "start_from": str(folder / f"{kind}-to-{path[0]}" / "checkpoints") if len(path) > 1 else None,
        "only_saves": only_saves,
    }


def run_jobs(jobs: list[dict[str, Any]], folder: Path) -> None:
    (folder / "jobs.json").write_text(json.dumps(jobs))
    done = run("-W", "ignore", "-m", "tests.distributed.jobs_worker", folder / "jobs.json", timeout=900)
    assert done.returncode == 0, (done.stdout + done.stderr)[-3000:]
    # megatron-core warns with these words where the ranks' plain values differ.
    assert "common state dict differs" not in done.stdout + done.stderr


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory, request: pytest.FixtureRequest) -> Path:
    """The folder of all runs that the selected tests look at."""

    def selected(test: Callable[..., None]) -> list[tuple[str, ...]]:
        items = [item for item in request.session.items if item.path == request.node.path]
        return [item.callspec.params["path"] for item in items if item.originalname == test.__name__]

    folder = tmp_path_factory.mktemp("reshard")
    write_text(folder)
    elsewhere, same = selected(test_resumed_elsewhere_equals_never_stopped), selected(test_resumed_in_the_same_layout)
    base = ["phases=[{kind: pretrain, steps: 1, lr: 1e-3}]", "checkpoint.load_base=null"]
    jobs = [{"recipe": recipe(folder, "base"), "overrides": base, "processes": 1}]
    again = {path: job(folder, *path, only_saves=True) for path in selected(test_every_number_is_kept)}
    resumed = {path: job(folder, *path) for path in [*elsewhere, *((kind, layout, layout) for kind, layout in same)]}
    saved = {path[:2]: job(folder, *path[:2], stops=True) for path in [*resumed, *again]}
    whole = {path: job(folder, *path) for path in [*same, *((path[0], "one") for path in elsewhere)]}
    run_jobs([*jobs, *saved.values(), *whole.values(), *resumed.values(), *again.values()], folder)
    return folder


@pytest.mark.parametrize("path", SAVED_AGAIN, ids="-to-".join)
def test_every_number_is_kept(folder: Path, path: tuple[str, str, str]) -> None:
    kind, saver, loader = path
    before = folder / f"{kind}-to-{saver}" / "checkpoints" / "step_00000004"
    again = folder / f"{kind}-to-{saver}-to-{loader}-again" / "checkpoints" / "again" / "step_00000004"
    assert_same_tensors(checkpoint_tensors(again), checkpoint_tensors(before))
    common = [torch.load(folder / "common.pt", weights_only=True) for folder in (before, again)]
    assert common[0] == common[1]
    assert common[0]["adam_step"] == 2 and 0 < common[0]["merge_fraction"] < 1


@pytest.mark.parametrize("path", RESUMED, ids="-to-".join)
def test_resumed_elsewhere_equals_never_stopped(folder: Path, path: tuple[str, str, str]) -> None:
    kind, saver, loader = path
    for tag in TAGS:
        whole = scalars(folder / f"{kind}-to-one-whole", tag)
        resumed = scalars(folder / f"{kind}-to-{saver}-to-{loader}", tag)
        assert sorted(resumed) == [5, 6]
        assert resumed == pytest.approx({step: whole[step] for step in (5, 6)}, rel=TOLERANCE[kind]), tag


@pytest.mark.parametrize("path", SAME, ids="-".join)
def test_resumed_in_the_same_layout(folder: Path, path: tuple[str, str]) -> None:
    kind, layout = path
    whole = folder / f"{kind}-to-{layout}-whole" / "checkpoints" / "step_00000006"
    resumed = folder / f"{kind}-to-{layout}-to-{layout}" / "checkpoints" / "step_00000006"
    # To the last bit.
    assert_same_tensors(checkpoint_tensors(resumed), checkpoint_tensors(whole))
