"""The same retrofit in two processes: losses, ratios and gradient norms do not depend on the layout."""

import os
import socket
import subprocess
import sys
from pathlib import Path

import pytest
from toy import recipe_values, scalars, write_recipe, write_text

pytestmark = pytest.mark.distributed

LAYOUTS = {
    "dp2": [],
    "tp2": ["parallel.tensor_model_parallel_size=2"],
    "tp2-sp": ["parallel.tensor_model_parallel_size=2", "parallel.sequence_parallel=true"],
    "pp2": ["parallel.pipeline_model_parallel_size=2"],
}
TAGS = (
    "loss/lm",
    "compression_ratio/noisy",
    "compression_ratio/noise_free",
    "train/gradient_norm",
)
# What is trained, and with it what travels through the layout.
KINDS = {
    "full": [],
    "window-distilled": ["dmc.local_window=4", "distillation.weight=0.5", "distillation.top_k=20"],
    "evict-adapter-distilled": [
        *("dmc.local_window=4", "dmc.operation=evict", "training.train=adapter", "training.recompute=full"),
        *("distillation.weight=1", "distillation.direction=reverse"),
    ],
}


def run(recipe: Path, processes: int, overrides: list[str]) -> None:
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        port = probe.getsockname()[1]
    command = [sys.executable, "-m", "torch.distributed.run", f"--nproc-per-node={processes}", f"--master-port={port}"]
    command += ["-m", "megatron_dmc", "retrofit", str(recipe), *overrides]
    environment = {**os.environ, "OMP_NUM_THREADS": "1", "PYTHONWARNINGS": "ignore"}
    done = subprocess.run(command, env=environment, capture_output=True, text=True, timeout=300)
    assert done.returncode == 0, done.stderr[-3000:]


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Text, initial weights, and the runs of one process."""
    folder = tmp_path_factory.mktemp("layouts")
    write_text(folder)
    run(recipe(folder, "base"), 1, ["phases=[{kind: pretrain, steps: 1, lr: 1e-3}]", "checkpoint.load_base=null"])
    for kind, overrides in KINDS.items():
        run(recipe(folder, f"one-{kind}"), 1, overrides)
    return folder


def recipe(folder: Path, name: str) -> Path:
    phases = [{"kind": "compress", "steps": 5, "lr": 1e-3, "start_compression_ratio": 2.0}]
    values = recipe_values(folder, folder / name, phases, temperature=0.5)
    values["data"]["sequence_length"] = 32
    values["model"]["init_method_std"] = 0.2
    values["training"]["micro_batch_size"] = 1
    values["checkpoint"]["load_base"] = str(folder / "base" / "checkpoints" / "final")
    return write_recipe(folder / name, values)


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("layout", LAYOUTS)
def test_layout_equals_one_process(folder: Path, layout: str, kind: str) -> None:
    name = f"{layout}-{kind}"
    run(recipe(folder, name), 2, LAYOUTS[layout] + KINDS[kind])
    for tag in TAGS if kind == "full" else (*TAGS, "loss/distillation"):
        assert scalars(folder / name, tag) == pytest.approx(scalars(folder / f"one-{kind}", tag), rel=5e-5), tag
