"""Whole runs of the trainer at toy size: phases, resume, recomputation, saving, settings that are refused."""

import shutil
from pathlib import Path
from typing import Any

import pytest
import torch

from megatron_dmc.cli import main
from megatron_dmc.config import DMCConfig
from megatron_dmc.data import build_indexed_dataset
from megatron_dmc.data.tokenizer import load_tokenizer
from megatron_dmc.files import LOCK
from megatron_dmc.model.attention import DMCSelfAttention
from megatron_dmc.model.gpt import dmc_layers
from megatron_dmc.recipe import load_recipe
from megatron_dmc.training.schedule import plan_step
from megatron_dmc.training.trainer import Trainer
from tests.support.models import positions, random_model, tokens
from tests.support.tensors import assert_same_tensors, checkpoint_tensors
from tests.support.texts import full_disk
from tests.support.toy import LR, RETROFIT, TEXT, recipe_values, scalars, train, weights, write_recipe, write_text

pytestmark = pytest.mark.usefixtures("one_process")

WITH_ZERO_OUT = [{"kind": "zero_out", "steps": 4, "lr": LR}, *RETROFIT]


@pytest.mark.parametrize(
    ("source", "phases", "stops"),
    [("projection", RETROFIT, [2, 4]), ("neuron", WITH_ZERO_OUT, [3, 1, 4])],
    ids=["projection", "neuron"],
)
@pytest.mark.parametrize("bf16", [False, True], ids=["fp32", "bf16"])
def test_resumed_equals_not_stopped(
    data: Path, tmp_path: Path, source: str, phases: list[dict[str, Any]], stops: list[int], bf16: bool
) -> None:
    runs = []
    for name, exits in (("whole", []), ("stopped", stops)):
        values = recipe_values(data, tmp_path / name, phases, decision_source=source)
        values["training"]["bf16"] = bf16
        recipe = write_recipe(tmp_path / name, values)
        for steps in exits:
            train(recipe, f"training.exit_after_steps={steps}")
        runs.append(weights(train(recipe)))
    assert_same_tensors(runs[1], runs[0])
    for tag in ("loss/lm", "compression_ratio/noisy", "train/gradient_norm"):
        assert scalars(tmp_path / "stopped", tag) == scalars(tmp_path / "whole", tag)
    assert len(scalars(tmp_path / "whole", "loss/lm")) == sum(phase["steps"] for phase in phases)


def test_end_of_zero_out_survives_the_next_step_in_bf16(data: Path, tmp_path: Path) -> None:
    phases = [{"kind": "zero_out", "steps": 3, "lr": LR}, {"kind": "compress", "steps": 1, "lr": LR}]
    values = recipe_values(data, tmp_path, phases, decision_source="neuron", decision_bias=5.0)
    values["training"]["bf16"] = True
    values["model"]["init_method_std"] = 0.2
    trainer = train(write_recipe(tmp_path, values), "training.exit_after_steps=3")
    assert decision_rows(trainer).abs().max() == 0
    trainer = train(write_recipe(tmp_path, values))
    # Adam's first step moves a weight by its learning rate; the rows were about 0.2 before they were cleared.
    assert 0 < decision_rows(trainer).abs().max() < 1.1 * LR


def decision_rows(trainer: Trainer) -> torch.Tensor:
    rows = []
    for layer in dmc_layers(trainer.model[0]):
        weight = layer.linear_qkv.weight.view(2, -1, layer.hidden_size_per_attention_head, 32)
        rows.append(weight[:, :-1, -1].detach().float())
    return torch.stack(rows)


def test_recomputation_changes_nothing(data: Path, tmp_path: Path) -> None:
    runs = {}
    for kind in ("none", "selective", "full"):
        values = recipe_values(data, tmp_path / kind, RETROFIT[:1])
        values["training"]["recompute"] = kind
        runs[kind] = weights(train(write_recipe(tmp_path / kind, values)))
    for kind in ("selective", "full"):
        assert_same_tensors(runs[kind], runs["none"])
        # Counted once, although the forward pass ran twice.
        for tag in ("compression_ratio/noisy", "compression_ratio/noise_free"):
            assert scalars(tmp_path / kind, tag) == scalars(tmp_path / "none", tag)


def test_micro_batches_change_nothing_but_rounding(data: Path, tmp_path: Path) -> None:
    losses = []
    for size in (1, 4):
        values = recipe_values(data, tmp_path / str(size), RETROFIT[:1])
        values["training"]["micro_batch_size"] = size
        train(write_recipe(tmp_path / str(size), values))
        losses.append(scalars(tmp_path / str(size), "loss/lm"))
    assert losses[0] == pytest.approx(losses[1], rel=2e-5)


def test_loss_pulls_the_ratio_up_to_its_target(data: Path, tmp_path: Path) -> None:
    values = recipe_values(data, tmp_path, [{"kind": "compress", "steps": 40, "lr": LR}], target_compression_ratio=2.0)
    train(write_recipe(tmp_path, values))
    reached = scalars(tmp_path, "compression_ratio/noise_free")
    assert reached[1] < 1.2
    assert reached[40] > 1.9
    assert scalars(tmp_path, "compression_ratio/target")[40] == 2.0


def test_gradient_of_the_loss_and_its_gate(data: Path, tmp_path: Path) -> None:
    trainer = Trainer(load_recipe(write_recipe(tmp_path, recipe_values(data, tmp_path, RETROFIT))))
    plan = plan_step(trainer.recipe.phases, trainer.recipe.dmc, 2)
    micro_batches = trainer._micro_batches(trainer.train_data, 0)
    # lambda 10 over 2 layers x 2 heads x 33 positions x 4 samples, times the 132 tokens that megatron-core divides by.
    assert trainer._alpha_gradient(plan, micro_batches) == pytest.approx(-10 / (2 * 2 * 33 * 4) * 132)
    assert plan.target_compression_ratio is not None
    trainer.merge_fraction = 1 - 1 / plan.target_compression_ratio
    assert trainer._alpha_gradient(plan, micro_batches) == 0


@pytest.mark.parametrize(
    ("overrides", "message"),
    [
        (["dmc.target_compression=4"], "dmc.target_compression"),
        (["dmc.temperature=warm"], "dmc.temperature"),
        (["dmc.target_compression_ratio=0.5"], "target_compression_ratio must be >= 1"),
        (["model.num_query_groups=3"], "must be divisible by model.num_query_groups"),
        (["model.vocab_size=200"], "vocab"),
        (["model.num_experts=8"], "model.num_experts"),
        (["data.sequence_length=512"], "max_position_embeddings"),
        (["data.train=[/nowhere/text]"], "/nowhere/text"),
        (["data.tokenizer=/nowhere"], "/nowhere"),
        (["phases=[]"], "phases is empty"),
        (["phases.0.kind=zero_out"], "only for dmc.decision_source neuron"),
        (["training.global_batch_size=3"], "global_batch_size"),
        (["parallel.tensor_model_parallel_size=4"], "tensor_model_parallel_size"),
        (["checkpoint.load_base=/nowhere"], "/nowhere"),
        (["checkpoint.directory=/proc/version/checkpoints"], "checkpoint.directory"),
        (["nonsense"], "section.field=value"),
        (["phases.0.lr=.nan"], "phases[0].lr"),
        (["training.adam_beta1=1.5"], "training.adam_beta1"),
        (["training.weight_decay=.inf"], "training.weight_decay"),
        (["training.seed=-1"], "training.seed"),
        (["checkpoint.keep_last=0"], "checkpoint.keep_last"),
        (["dmc.seed=-1"], "dmc.seed"),
    ],
    ids=lambda value: value[0] if isinstance(value, list) else None,
)
def test_bad_settings_end_in_one_line(
    data: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str], overrides: list[str], message: str
) -> None:
    recipe = write_recipe(tmp_path, recipe_values(data, tmp_path, RETROFIT))
    assert main(["retrofit", str(recipe), *overrides]) == 1
    (line,) = [line for line in capsys.readouterr().err.splitlines() if line.startswith("megatron-dmc:")]
    assert message in line
    assert not (tmp_path / "checkpoints").exists()


def test_saving_in_the_background_changes_nothing(data: Path, tmp_path: Path) -> None:
    folders = []
    for is_async in (False, True):
        folder = tmp_path / str(is_async)
        values = recipe_values(data, folder, RETROFIT, target_compression_ratio=3.0)
        values["checkpoint"] |= {"save_interval": 1, "keep_last": 3, "async_save": is_async}
        recipe = write_recipe(folder, values)
        train(recipe, "training.exit_after_steps=5")
        train(recipe)
        folders.append(folder / "checkpoints")
    names = [{path.name for path in folder.iterdir()} for folder in folders]
    assert (
        names[0]
        == names[1]
        == {
            *(LOCK, "cr_2", "cr_3", "final", "latest"),
            *(f"step_{step:08d}" for step in (7, 8, 9)),
        }
    )
    for name in ("cr_2", "final", "step_00000008", "step_00000009"):
        assert_same_tensors(*(checkpoint_tensors(folder / name) for folder in folders))
    assert (folders[1] / "latest").read_text() == "step_00000009\n"


def test_the_state_is_gathered_when_the_save_before_is_done(data: Path, tmp_path: Path) -> None:
    values = recipe_values(data, tmp_path, [{"kind": "compress", "steps": 1, "lr": LR}])
    values["checkpoint"]["async_save"] = True
    trainer = Trainer(load_recipe(write_recipe(tmp_path, values)))
    gather, writes = trainer.optimizer.sharded_state_dict, []

    def watched(*arguments: Any, **keywords: Any) -> Any:
        writes.append(trainer.store.background._thread)
        return gather(*arguments, **keywords)

    trainer.optimizer.sharded_state_dict = watched
    # "final", and at once the full one.
    trainer.run()
    assert writes == [None]


def test_a_failed_save_in_the_background_ends_the_run_in_one_line(
    data: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    values = recipe_values(data, tmp_path, RETROFIT)
    values["checkpoint"] |= {"save_interval": 1, "async_save": True, "save_every_integer_ratio": False}
    values["monitor"]["tensorboard"] = None
    recipe = str(write_recipe(tmp_path, values))
    assert main(["retrofit", recipe, "training.exit_after_steps=1"]) == 0
    with full_disk(20_000):
        assert main(["retrofit", recipe]) == 1
    (line,) = [line for line in capsys.readouterr().err.splitlines() if line.startswith("megatron-dmc:")]
    assert "step_00000002: File too large" in line and "earlier checkpoints are untouched" in line
    assert {path.name for path in (tmp_path / "checkpoints").iterdir()} == {LOCK, "latest", "step_00000001"}
    assert main(["retrofit", recipe]) == 0


def test_resume_on_a_dataset_built_anew_is_refused(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    write_text(tmp_path)
    recipe = str(write_recipe(tmp_path / "run", recipe_values(tmp_path, tmp_path / "run", RETROFIT)))
    assert main(["retrofit", recipe, "training.exit_after_steps=1"]) == 0
    tokenizer = load_tokenizer(tmp_path / "tokenizer")
    build_indexed_dataset(TEXT[:50], tokenizer, tmp_path / "train")
    assert main(["retrofit", recipe, "training.exit_after_steps=1"]) == 0
    # Equally many tokens in every document: the index is the same.
    build_indexed_dataset([text.replace("cat", "tac") for text in TEXT[:50]], tokenizer, tmp_path / "train")
    assert main(["retrofit", recipe]) == 1
    assert f"dataset {tmp_path / 'train'} has other contents than the one that" in capsys.readouterr().err


def test_a_lower_rate_may_resume_a_run_that_diverged(
    data: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    recipe = str(write_recipe(tmp_path, recipe_values(data, tmp_path, RETROFIT)))
    assert main(["retrofit", recipe, "training.exit_after_steps=2"]) == 0
    assert main(["retrofit", recipe, "phases.0.lr=1.0e30", "checkpoint.save_interval=1"]) == 1
    assert "training diverged; lower phases[0].lr" in capsys.readouterr().err
    (tmp_path / "checkpoints" / "latest").write_text("step_00000002\n")
    assert main(["retrofit", recipe, "phases.0.lr=1.0e-4"]) == 0


def test_a_run_without_latest_goes_on_from_its_newest_checkpoint(
    data: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str], caplog: pytest.LogCaptureFixture
) -> None:
    recipe = str(write_recipe(tmp_path, recipe_values(data, tmp_path, RETROFIT)))
    checkpoints = tmp_path / "checkpoints"
    for _ in range(2):
        assert main(["retrofit", recipe, "training.exit_after_steps=1"]) == 0
    (checkpoints / "latest").unlink()
    assert main(["retrofit", recipe, "training.exit_after_steps=1"]) == 0
    assert f"{checkpoints}/latest is missing; resuming from step_00000002, the newest full checkpoint" in caplog.text
    assert (checkpoints / "latest").read_text() == "step_00000003\n"
    (checkpoints / "step_00000003" / "common.pt").unlink()
    assert main(["retrofit", recipe]) == 1
    assert f"common.pt is missing; write step_00000002 into {checkpoints}/latest to resume" in capsys.readouterr().err
    shutil.rmtree(checkpoints / "step_00000003")
    assert main(["retrofit", recipe]) == 1
    assert (
        f"{checkpoints}/latest names step_00000003, which is not there; write step_00000002" in capsys.readouterr().err
    )
    for path in checkpoints.glob("step_*"):
        shutil.rmtree(path)
    assert main(["retrofit", recipe]) == 1
    assert "which is not there; name a new checkpoint.directory to begin anew" in capsys.readouterr().err


def test_attention_without_sample_numbers_is_refused() -> None:

    model, ids = random_model(DMCConfig()).train(), tokens(1, 8)
    assert any(isinstance(module, DMCSelfAttention) for module in model.modules())
    with pytest.raises(ValueError, match="global sample indices"):
        model(ids, positions(ids), None)
