"""Held-out evaluations before, during and after training: a curve, and nothing of the training changes."""

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
