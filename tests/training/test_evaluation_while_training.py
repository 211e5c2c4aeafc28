"""Held-out evaluations before, during and after training: a curve, and nothing of the training changes."""

import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest

from megatron_dmc.recipe import load_recipe
from megatron_dmc.training.trainer import Trainer
from tests.support.tensors import assert_same_tensors
from tests.support.toy import recipe_values, scalars, write_recipe, write_text

pytestmark = pytest.mark.usefixtures("one_process")

LR = 5e-3
PHASES = [{"kind": "zero_out", "steps": 2, "lr": LR}, {"kind": "compress", "steps": 4, "lr": LR}]


@pytest.fixture(scope="module")
def data(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("data")
    write_text(folder)
    return folder


def run(texts: Path, folder: Path, **sections: dict[str, Any]) -> Trainer:
    values = recipe_values(texts, folder, PHASES, decision_source="neuron")
    for section, settings in sections.items():
        values[section] = values.get(section, {}) | settings
    trainer = Trainer(load_recipe(write_recipe(folder, values)))
    trainer.run()
    return trainer


@pytest.mark.parametrize(
    "sections",
    [{}, {"parallel": {"overlap": True}}, {"training": {"bf16": True}}, {"training": {"recompute": "full"}}],
    ids=["plain", "overlap", "bf16", "recomputed"],
)
def test_evaluations_make_a_curve_and_change_nothing(
    data: Path, tmp_path: Path, sections: dict[str, dict[str, Any]]
) -> None:
    parameters = []
    often, never = {"monitor": {"eval_interval": 2}}, {"data": {"valid": []}}
    for name, more in (("often", often), ("never", never)):
        trainer = run(data, tmp_path / name, **more, **sections)
        parameters.append({name: x.detach().clone() for name, x in trainer.model[0].named_parameters()})
    assert list(scalars(tmp_path / "often", "evaluation/lm_loss")) == [0, 2, 4, 6]
    assert list(scalars(tmp_path / "often", "evaluation/compression_ratio")) == [4, 6]
    for tag in ("loss/lm", "train/gradient_norm", "compression_ratio/noisy", "compression_ratio/noise_free"):
        assert scalars(tmp_path / "often", tag) == scalars(tmp_path / "never", tag)
    assert_same_tensors(*parameters)


def test_the_curve_begins_before_the_first_step(data: Path, tmp_path: Path) -> None:
    run(data, tmp_path)
    losses = scalars(tmp_path, "evaluation/lm_loss")
    assert list(losses) == [0, 6]
    # Initial weights know nothing: log 300 nats per token.
    assert losses[0] == pytest.approx(5.7, abs=0.1)


def test_no_held_out_sample_counts_twice(data: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """The text has 34 samples: 8 whole batches."""
    losses, warnings = [], []
    for wanted in (32, 34, 36, 60):
        run(data, tmp_path / str(wanted), monitor={"eval_samples": wanted})
        losses.append(scalars(tmp_path / str(wanted), "evaluation/lm_loss"))
        warnings.append([line for line in capsys.readouterr().err.splitlines() if "data.valid" in line])
    assert losses[1:] == losses[:1] * 3
    assert warnings == [
        [],
        [],
        *(
            [
                "warning: data.valid has 34 samples of 33 tokens: an evaluation reads 32, each once, in place of "
                f"{wanted} (monitor.eval_samples)"
            ]
            for wanted in (36, 60)
        ),
    ]


def test_fewer_held_out_samples_than_a_batch(data: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    run(data, tmp_path, training={"global_batch_size": 36})
    assert list(scalars(tmp_path, "evaluation/lm_loss")) == [0, 6]
    (warning,) = [line for line in capsys.readouterr().err.splitlines() if "data.valid" in line]
    assert warning == (
        "warning: data.valid has 34 samples of 33 tokens, fewer than a global batch: an evaluation reads 36, some of them "
        "more than once; hold out more text"
    )


@pytest.mark.distributed
def test_layouts_read_the_same_held_out_samples(data: Path, tmp_path: Path) -> None:
    values = recipe_values(data, tmp_path, PHASES, decision_source="neuron")
    values["monitor"] |= {"eval_samples": 2**20, "progress_bar": True}
    # 35 samples
    values["data"]["sequence_length"] = 32
    path = str(write_recipe(tmp_path, values))
    said = []
    for ranks, settings in ((1, []), (2, []), (2, ["parallel.context_parallel_size=2"])):
        launcher = [sys.executable, "-m", "torch.distributed.run", "--standalone", f"--nproc-per-node={ranks}"]
        command = [*launcher, "-m", "megatron_dmc", "retrofit", path, *settings, "training.exit_after_steps=1"]
        command += [f"checkpoint.directory={tmp_path / str(len(said))}", "monitor.tensorboard=null"]
        done = subprocess.run(command, capture_output=True, text=True, timeout=300, check=False)
        assert done.returncode == 0, done.stderr
        said.append([line for line in done.stderr.splitlines() if line.startswith(("held-out", "warning: data.valid"))])
    assert said[1:] == said[:1] * 2
    assert len(said[0]) == 2 and "reads 32, each once" in said[0][0]
