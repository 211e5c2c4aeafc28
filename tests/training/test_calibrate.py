"""The phase ``calibrate``: decisions from the base's attention, whole or resumed; what it refuses."""

import json
import math
import re
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file

from megatron_dmc.calibration import CalibrationError, calibrator
from megatron_dmc.calibration.observation import observe
from megatron_dmc.checkpoint import CheckpointError, SavedModel
from megatron_dmc.checkpoint.load import check_files
from megatron_dmc.config import ConfigError
from megatron_dmc.convert.to_hf import export_adapter, export_hf
from megatron_dmc.data import build_indexed_dataset
from megatron_dmc.data.tokenizer import load_tokenizer
from megatron_dmc.inference.loading import load_model
from megatron_dmc.model.decision_projection import is_buffer
from megatron_dmc.model.gpt import dmc_layers
from megatron_dmc.recipe import load_recipe
from megatron_dmc.training import run_state
from megatron_dmc.training.schedule import plan_step
from megatron_dmc.training.step import MULTIPLIER_GAIN, next_multiplier, offset_gain, offset_step
from megatron_dmc.training.trainer import Trainer, TrainingError
from tests.support.processes import at_work_in
from tests.support.tensors import assert_same_tensors
from tests.support.toy import LR, recipe_values, scalars, train, weights, write_base, write_recipe

pytestmark = pytest.mark.usefixtures("one_process")

CALIBRATE = {"kind": "calibrate", "steps": 10}
DMC = {"local_window": 4, "operation": "evict", "decision_bias": 5.0, "decision_scale": 1.0}


@pytest.fixture(scope="module")
def data(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Texts, and a base that has learned some of them, in ``base/checkpoints/final``."""
    folder = tmp_path_factory.mktemp("data")
    write_base(folder, 40)
    return folder


def recipe(data: Path, run: Path, phases: list[dict[str, Any]], *, bf16: bool = False, **dmc: Any) -> Path:
    values = recipe_values(data, run, phases, **({"target_compression_ratio": 3.0} | DMC | dmc))
    values["checkpoint"]["load_base"] = str(data / "base" / "checkpoints" / "final")
    values["training"] |= {"train": "adapter", "bf16": bf16}
    return write_recipe(run, values)


@pytest.mark.parametrize("ratio", [1.5, 3.0])
@pytest.mark.parametrize("per_layer", [False, True], ids=["per head", "per layer"])
def test_a_calibration_alone_is_a_model_at_the_asked_ratio(
    data: Path, tmp_path: Path, ratio: float, per_layer: bool
) -> None:
    """On text that it did not read."""
    path = recipe(data, tmp_path, [CALIBRATE], target_compression_ratio=ratio, per_layer=per_layer)
    trainer = train(path)
    assert scalars(tmp_path, "evaluation/compression_ratio")[10] == pytest.approx(ratio, rel=0.1)
    for layer in range(2):
        assert 0.2 < scalars(tmp_path, f"calibration_r2_layer/{layer:02d}")[10] < 1
    loaded = load_model(tmp_path / "checkpoints" / "final", must_merge=True)
    assert loaded.compression_ratio == pytest.approx(ratio, rel=0.02)
    same = weights(trainer)
    for name, value in loaded.model.named_parameters():
        assert torch.equal(value, same["module." + name]), name


def test_the_base_stays_what_it_is(data: Path, tmp_path: Path) -> None:
    before = dict(load_model(data / "base" / "checkpoints" / "final").model.named_parameters())
    for name, weight in weights(train(recipe(data, tmp_path, [CALIBRATE]))).items():
        name = name.removeprefix("module.")
        if ".decision." in name:
            assert weight.any()
        else:
            assert torch.equal(weight, before[name]), name


@pytest.mark.parametrize(
    ("bf16", "control"), [(False, "loss"), (True, "loss"), (True, "offset")], ids=["fp32", "bf16", "offset"]
)
def test_resumed_equals_not_stopped(data: Path, tmp_path: Path, bf16: bool, control: str) -> None:
    """Stopped while it learns, after that, between the phases, and in the next phase."""
    phases = [CALIBRATE, {"kind": "solidify", "steps": 4, "lr": 1e-2}]
    runs = []
    for name, exits in (("whole", []), ("stopped", [3, 6, 1, 2])):
        path = recipe(data, tmp_path / name, phases, bf16=bf16, ratio_control=control)
        for steps in exits:
            train(path, f"training.exit_after_steps={steps}")
        runs.append(weights(train(path)))
    assert_same_tensors(runs[1], runs[0])


def test_a_step_moves_logits_by_the_learning_rate_whatever_stands_out(data: Path, tmp_path: Path) -> None:
    """The sum of |D h| over the channels is about 1: the mean of a channel's |D h| is its share of the whole."""
    trainer = train(recipe(data, tmp_path, [CALIBRATE]))
    seen: list[torch.Tensor] = []
    layers = dmc_layers(trainer.model[0])
    hooks = [
        x.decision.register_forward_pre_hook(lambda module, args: seen.append(args[0] * module.input_scale))
        for x in layers
    ]
    trainer.evaluate(plan_step(trainer.recipe.phases, trainer.recipe.dmc, trainer.recipe.total_steps - 1))
    for hook in hooks:
        hook.remove()
    assert len(seen) >= len(layers)
    for scaled in seen:
        assert 0.4 < float(scaled.abs().sum(-1).mean()) < 1.6
    for layer in layers:
        exponents = layer.decision.input_scale.log2()
        assert torch.equal(exponents, exponents.round())


def test_training_goes_on_from_a_calibrated_checkpoint(data: Path, tmp_path: Path) -> None:
    train(recipe(data, tmp_path / "first", [CALIBRATE]))
    path = recipe(data, tmp_path / "second", [{"kind": "solidify", "steps": 2, "lr": 1e-3}])
    train(path, f"checkpoint.load_base={tmp_path}/first/checkpoints/final")
    assert scalars(tmp_path / "second", "evaluation/compression_ratio")[0] == pytest.approx(3.0, rel=0.1)
    path = recipe(data, tmp_path / "third", [CALIBRATE])
    with pytest.raises(ConfigError, match="is a retrofitted model, and calibrate would replace its decisions"):
        train(path, f"checkpoint.load_base={tmp_path}/first/checkpoints/final")


def test_a_checkpoint_from_the_middle_has_no_decisions(data: Path, tmp_path: Path) -> None:
    train(recipe(data, tmp_path, [CALIBRATE]), "training.exit_after_steps=9")
    middle = tmp_path / "checkpoints" / "step_00000009"
    with pytest.raises(ConfigError, match="was saved before its run began to merge"):
        load_model(middle, must_merge=True)
    for phase in (CALIBRATE, {"kind": "solidify", "steps": 2}):
        with pytest.raises(
            ConfigError, match="was saved in the middle of a calibration, its decisions are not made yet"
        ):
            train(recipe(data, tmp_path / phase["kind"], [phase]), f"checkpoint.load_base={middle}")


def test_text_that_was_learned_from_is_not_other_text(
    data: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    build_indexed_dataset(["tick tock " * 60], load_tokenizer(str(data / "tokenizer")), str(tmp_path / "small"))
    train(recipe(data, tmp_path / "run", [CALIBRATE]), f"data.train=[{tmp_path}/small]")
    said = capsys.readouterr().err
    assert re.search(
        r"warning: data.train has \d+ samples of \d+ tokens, the run reads \d+: a part of the text that", said
    )
    train(recipe(data, tmp_path / "more", [CALIBRATE]))
    assert "of the text that" not in capsys.readouterr().err


def test_a_bias_that_bfloat16_cannot_be_exact_beside(data: Path, tmp_path: Path) -> None:
    """Refused where it is to be calibrated; what has such a one already is read, and goes on."""
    path = recipe(data, tmp_path, [CALIBRATE, {"kind": "solidify", "steps": 1}])
    train(path, "training.exit_after_steps=10")
    info = tmp_path / "checkpoints" / "step_00000010" / "dmc.json"
    values = json.loads(info.read_text())
    values["recipe"]["dmc"]["decision_bias"] = 100.0
    info.write_text(json.dumps(values))
    assert load_model(info.parent, must_merge=True).merges
    train(path, "dmc.decision_bias=100")
    with pytest.raises(
        ConfigError, match=r"phases\[0\].kind calibrate takes a dmc.decision_bias of at most 16, got 100"
    ):
        train(recipe(data, tmp_path / "new", [CALIBRATE]), "dmc.decision_bias=100")


@pytest.mark.parametrize(
    ("phases", "overrides", "problem"),
    [
        (
            [CALIBRATE],
            ["dmc.decision_source=neuron"],
            "calibrate is only for dmc.decision_source projection, got neuron",
        ),
        (
            [{"kind": "solidify", "steps": 1}, CALIBRATE],
            [],
            r"phases\[1\].kind calibrate would undo the decisions of phases\[0\]",
        ),
        ([CALIBRATE | {"steps": 1}], [], r"phases\[0\].steps must be >= 2 for calibrate, got 1"),
        ([CALIBRATE], ["checkpoint.load_base=null", "training.train=full"], "calibrate needs a trained base"),
        (
            [CALIBRATE | {"steps": 2}],
            ["training.global_batch_size=1", "training.micro_batch_size=1", "data.sequence_length=17"],
            r"learn from 12 tokens and the regression needs more than 32 .*set it to 54 or more",
        ),
        ([CALIBRATE], ["dmc.local_window=33"], r"dmc.local_window \(33\) must be smaller than data.sequence_length"),
    ],
)
def test_recipes_that_cannot_calibrate(
    data: Path, tmp_path: Path, phases: list[dict[str, Any]], overrides: list[str], problem: str
) -> None:
    with pytest.raises(ConfigError, match=problem):
        load_recipe(recipe(data, tmp_path, phases), overrides)


def test_constant_text_is_refused(data: Path, tmp_path: Path) -> None:
    build_indexed_dataset(["a" * 40_000], load_tokenizer(str(data / "tokenizer")), str(tmp_path / "constant"))
    path = recipe(data, tmp_path / "run", [CALIBRATE])
    with pytest.raises(CalibrationError, match="all tokens of the text have nearly the same hidden state in layer"):
        train(path, f"data.train=[{tmp_path}/constant]")


def test_an_offset_needs_decisions(data: Path, tmp_path: Path) -> None:
    path = recipe(data, tmp_path, [{"kind": "compress", "steps": 2}], ratio_control="offset")
    with pytest.raises(
        ConfigError, match="offset would switch the decisions of an untrained projection all at once; put"
    ):
        Trainer(load_recipe(path))


def test_a_rate_in_logits_is_none_for_a_base(data: Path, tmp_path: Path) -> None:
    path = recipe(data, tmp_path, [CALIBRATE, {"kind": "solidify", "steps": 2, "lr": 0.3}], ratio_control="offset")
    with pytest.raises(
        ConfigError, match=r"phases\[1\].lr 0.3 is a rate for decisions alone, and training.train full would"
    ):
        Trainer(load_recipe(path, ["training.train=full"]))


@pytest.mark.parametrize("held_out", [True, False])
def test_a_damaged_base_is_refused_before_any_work(data: Path, tmp_path: Path, held_out: bool) -> None:
    overrides = [] if held_out else ["data.valid=[]"]
    trainer = Trainer(load_recipe(recipe(data, tmp_path, [CALIBRATE]), overrides))
    load = trainer.store.load

    def damaged(*arguments: Any) -> Any:
        found = load(*arguments)
        with torch.no_grad():
            dmc_layers(trainer.model[0])[1].linear_qkv.weight[3, 3] = float("nan")
        return found

    trainer.store.load = damaged  # type: ignore[method-assign]
    where = "held-out samples" if held_out else "the samples of step 1"
    with pytest.raises(TrainingError, match=f"the loss on {where} is nan before any training; the base is damaged"):
        trainer.run()


def test_a_base_without_hidden_states_is_refused(data: Path, tmp_path: Path) -> None:
    trainer = Trainer(load_recipe(recipe(data, tmp_path, [CALIBRATE])))
    load = trainer.store.load

    def damaged(*arguments: Any) -> Any:
        found = load(*arguments)
        with torch.no_grad():
            for name, weight in trainer.model[0].named_parameters():
                if "layers.1." in name and "input_layernorm" in name:
                    weight.zero_()
        return found

    trainer.store.load = damaged  # type: ignore[method-assign]
    with pytest.raises(CalibrationError, match="have nearly the same hidden state in layer 1"):
        trainer.run()


def test_scores_that_are_not_finite_are_refused(data: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def damaged(attention: Any, *seen: Any) -> Any:
        found = observe(attention, *seen)
        return found._replace(scores=found.scores + (math.inf if attention.layer_number == 2 else 0))

    monkeypatch.setattr(calibrator, "observe", damaged)
    with pytest.raises(CalibrationError, match="layer 1 are not finite"):
        train(recipe(data, tmp_path, [CALIBRATE]))


def test_what_a_calibration_had_learned_must_be_there(data: Path, tmp_path: Path) -> None:
    path = recipe(data, tmp_path, [CALIBRATE])
    train(path, "training.exit_after_steps=2")
    common = tmp_path / "checkpoints" / "step_00000002" / "common.pt"
    values = torch.load(common)
    del values["calibration"]
    torch.save(values, common)
    with pytest.raises(CheckpointError, match=r"step_00000002 is damaged: common.pt has no calibration.tokens"):
        train(path)


def test_two_runs_in_one_folder_are_refused(data: Path, tmp_path: Path) -> None:
    path = recipe(data, tmp_path, [CALIBRATE])
    with (
        at_work_in(tmp_path / "checkpoints") as other,
        pytest.raises(CheckpointError, match=f"checkpoints is in use by process {other.pid} on .*; wait until"),
    ):
        train(path)
    train(path)


@pytest.mark.parametrize("lr", [3e-3, 0.3])
def test_an_offset_keeps_the_ratio_at_its_rising_target(data: Path, tmp_path: Path, lr: float) -> None:
    """At learning rates that lie a hundred times apart; on held-out text."""
    compress = {"kind": "compress", "steps": 12, "lr": lr, "start_compression_ratio": 2.0}
    path = recipe(data, tmp_path, [CALIBRATE, compress], ratio_control="offset", target_compression_ratio=3.0)
    trainer = train(path, "monitor.eval_interval=1", "distillation.weight=1", "training.global_batch_size=8")
    held_out, target = scalars(tmp_path, "evaluation/compression_ratio"), scalars(tmp_path, "compression_ratio/target")
    assert all(0.85 < held_out[step] / target[step] < 1.15 for step in range(14, 23)), (held_out, target)
    offsets = {float(layer.decision.offset) for layer in dmc_layers(trainer.model[0])}
    assert len(offsets) == 1 and offsets != {0.0}


@pytest.mark.parametrize("hidden_size", [16, 48, 96])
def test_one_learning_rate_serves_every_width(data: Path, tmp_path: Path, hidden_size: int) -> None:
    """Learning rates count in logits: on held-out text the ratio stays near its rising target."""

    def values(name: str, phases: list[dict[str, Any]], **dmc: Any) -> dict[str, Any]:
        found = recipe_values(data, tmp_path / name, phases, **dmc)
        found["model"] |= {"hidden_size": hidden_size, "ffn_hidden_size": 2 * hidden_size, "num_attention_heads": 2}
        found["model"]["init_method_std"] = 0.2
        found["data"] |= {"sequence_length": 64, "cache": str(tmp_path / "cache")}
        found["training"] |= {"global_batch_size": 16, "micro_batch_size": 16}
        found["monitor"] |= {"eval_samples": 32, "eval_interval": 1}
        return found

    train(write_recipe(tmp_path / "base", values("base", [{"kind": "pretrain", "steps": 30, "lr": LR}])))
    ramp = {"kind": "compress", "steps": 24, "lr": 0.2, "start_compression_ratio": 2.0, "lr_warmup_steps": 3}
    settings = DMC | {"operation": "absorb", "ratio_control": "offset", "target_compression_ratio": 4.0}
    run = values("run", [CALIBRATE | {"steps": 5}, ramp], **settings)
    run["checkpoint"]["load_base"] = str(tmp_path / "base" / "checkpoints" / "final")
    run["training"]["train"] = "adapter"
    run["distillation"] = {"weight": 1.0}
    train(write_recipe(tmp_path / "run", run))
    ratio = scalars(tmp_path / "run", "evaluation/compression_ratio")
    target = scalars(tmp_path / "run", "compression_ratio/target")
    shares = {step: ratio[step] / target[step] for step in range(6, 30)}
    assert all(0.8 < share < 1.25 for share in shares.values()), shares


def test_an_offset_follows_the_target_and_a_part_of_the_error() -> None:
    """100 of 1000 tokens merge, 200 lie within half a logit: a logit moves 200 of them."""
    counts = torch.tensor([0, 100, 1000, 200]).view(4, 1, 1)
    now, more, less = (1 / (1 - share) for share in (0.1, 0.15, 0.05))
    assert offset_step(counts, now, now, 0.5) == pytest.approx(0)
    assert offset_step(counts, more, more, 0.5) == pytest.approx(0.5 * 50 / 200)
    assert offset_step(counts, less, less, 0.1) == pytest.approx(-0.1 * 50 / 200)
    assert offset_step(counts, now, more, 0.5) == pytest.approx(50 / 200)
    assert offset_step(counts, 4.0, 8.0, 0.5) == 0.5
    assert offset_step(torch.tensor([0, 0, 1000, 0]).view(4, 1, 1), 1.0, 2.0, 0.5) == 0.5


def test_the_offset_averages_over_batches_as_the_learning_rate_falls() -> None:
    assert [offset_gain(part) for part in (1.0, 0.5, 0.05, 0.0)] == [0.5, 0.25, 0.05, 0.05]


def test_a_multiplier_takes_what_an_offset_would_change() -> None:
    """A loss that rises by 6 with 3 merges more costs 2 per merge; with 2 as multiplier nothing is left to correct."""
    assert next_multiplier(None, 6.0, 3.0) == 2.0
    assert next_multiplier(2.0, 0.0, 3.0) == 2.0
    assert next_multiplier(2.0, 6.0, 3.0) == 2.0 + MULTIPLIER_GAIN * 2.0
    assert next_multiplier(2.0, 6.0, 0.0) == 2.0 and next_multiplier(None, 0.0, 0.0) is None


@pytest.mark.parametrize("bf16", [False, True], ids=["fp32", "bf16"])
def test_offset_and_input_scale_are_part_of_what_is_saved_and_exported(data: Path, tmp_path: Path, bf16: bool) -> None:
    path = recipe(
        data, tmp_path, [CALIBRATE, {"kind": "solidify", "steps": 3, "lr": 1e-2}], bf16=bf16, ratio_control="offset"
    )
    trainer = train(path)
    (layer, *_) = dmc_layers(trainer.model[0])
    assert layer.decision.offset.dtype == torch.float32
    saved = SavedModel.open(tmp_path / "checkpoints" / "final")
    for entries in (saved._stored.entries, dict(reversed(saved._stored.entries.items()))):
        # The offset is float32 in any case. Which tensor is stored first is nobody's business.
        other = replace(saved, _stored=saved._stored._replace(entries=entries))
        assert other.dtype == (torch.bfloat16 if bf16 else torch.float32)
    loaded = load_model(tmp_path / "checkpoints" / "final")
    again = dmc_layers(loaded.model)[0].decision
    assert torch.equal(again.offset, layer.decision.offset) and float(again.offset)
    assert torch.equal(again.input_scale, layer.decision.input_scale.float())
    export_hf(tmp_path / "checkpoints" / "final", tmp_path / "hf", dtype=torch.float32)
    exported = load_file(tmp_path / "hf" / "model.safetensors")
    name = "model.layers.0.self_attn.decision"
    hidden = torch.randn(5, 1, 32)
    ours, _ = loaded.model.decoder.layers[0].self_attention.decision_logits(hidden, hidden, hidden)
    theirs = hidden[:, 0] @ exported[f"{name}.weight"].T + exported[f"{name}.bias"]
    torch.testing.assert_close(theirs[:, 0::2] - 5.0, ours[0], rtol=1e-4, atol=1e-4)


def test_a_checkpoint_from_before_has_neither(data: Path, tmp_path: Path) -> None:
    """An older one lacks both tensors: the offset was 0 then, and every input counted as it was."""
    train(recipe(data, tmp_path, [{"kind": "solidify", "steps": 2, "lr": 1e-2}]))
    with pytest.MonkeyPatch.context() as patch:
        state = run_state.model_state
        patch.setattr(
            run_state,
            "model_state",
            lambda chunks: {
                chunk: {name: value for name, value in part.items() if not is_buffer(name)}
                for chunk, part in state(chunks).items()
            },
        )
        trainer = Trainer(load_recipe(recipe(data, tmp_path / "old", [{"kind": "solidify", "steps": 2, "lr": 1e-2}])))
        trainer.run()
    found = check_files(tmp_path / "old" / "checkpoints" / "final").entries
    assert not any(is_buffer(name) for name in found)
    loaded = load_model(tmp_path / "old" / "checkpoints" / "final")
    decision = dmc_layers(loaded.model)[0].decision
    assert torch.equal(decision.input_scale, torch.ones(32)) and not float(decision.offset)
    export_adapter(tmp_path / "old" / "checkpoints" / "final", tmp_path / "hf")
    resumed = Trainer(load_recipe(recipe(data, tmp_path / "old", [{"kind": "solidify", "steps": 2, "lr": 1e-2}])))
    assert resumed.store.load()[0] == 2
