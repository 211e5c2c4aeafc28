"""What a run tells its reader: what it is, where it starts, what it saved, and whether it reached its target."""

import json
import math
import os
import re
import subprocess
import sys
from dataclasses import replace
from pathlib import Path

import pytest
import torch
import yaml

from megatron_dmc.calibration import CalibrationResult
from megatron_dmc.checkpoint import CheckpointInfo
from megatron_dmc.cli import main
from megatron_dmc.config import DMCConfig
from megatron_dmc.data import build_indexed_dataset
from megatron_dmc.data.tokenizer import load_tokenizer, train_tokenizer
from megatron_dmc.recipe import PhaseConfig, Recipe, recipe_from_dict
from megatron_dmc.training import messages
from megatron_dmc.training.run_state import SavedCheckpoint
from tests.support.toy import recipe_values, write_recipe, write_text

pytestmark = pytest.mark.usefixtures("one_process")

LR = 5e-3
PHASES = [{"kind": "compress", "steps": 6, "lr": LR}, {"kind": "solidify", "steps": 2, "lr": LR}]


@pytest.fixture(scope="module")
def data(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Texts, and a pretrained base in ``base/checkpoints/final``."""
    folder = tmp_path_factory.mktemp("data")
    write_text(folder)
    values = recipe_values(folder, folder / "base", [{"kind": "pretrain", "steps": 2, "lr": LR}])
    assert main(["retrofit", str(write_recipe(folder / "base", values))]) == 0
    return folder


def retrofit(data: Path, folder: Path, *, shows: bool = True, adapter: bool = False, **dmc: float) -> str:
    """A recipe's file: to CR 3 from the base."""
    values = recipe_values(data, folder, PHASES, target_compression_ratio=3.0, **dmc)
    values["checkpoint"] |= {"load_base": str(data / "base" / "checkpoints" / "final"), "save_interval": 5}
    values["monitor"]["progress_bar"] = shows
    if adapter:
        values["training"]["train"] = "adapter"
        values["distillation"] = {"weight": 1.0}
    return str(write_recipe(folder, values))


def said(capsys: pytest.CaptureFixture[str]) -> list[str]:
    return capsys.readouterr().err.splitlines()


def test_a_run_introduces_itself(data: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["retrofit", retrofit(data, tmp_path, adapter=True)]) == 0
    lines = said(capsys)
    assert re.fullmatch(r"megatron-dmc \S+: adapter to CR 3, merge", lines[0])
    topics = [re.split(r"\s{2,}", line.strip(), maxsplit=1) for line in lines[1:11]]
    # 2 layers of a projection from 32 to alpha and omega of 2 KV heads, with a bias.
    assert topics == [
        ["model", "2 layers, 2 KV heads, 34,984 parameters"],
        ["trains", "264 of them, float32"],
        ["layout", "TP 1 x PP 1 x CP 1 x DP 1 on 1 CPU process"],
        ["phase", "compress, 6 steps, 792 tokens, CR 1 to 3"],
        ["phase", "solidify, 2 steps, 264 tokens"],
        ["data", f"{data / 'train'}, 1/3 of the samples a text twice"],
        ["held out", str(data / "valid")],
        ["checkpoints", f"{tmp_path / 'checkpoints'}, every 5 steps"],
        ["TensorBoard", str(tmp_path / "tensorboard")],
        [f"starting from {data / 'base' / 'checkpoints' / 'final'}"],
    ]


def test_a_teacher_that_is_not_used_is_named(data: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["retrofit", retrofit(data, tmp_path), "distillation.teacher=nowhere"]) == 0
    lines = [line.strip() for line in said(capsys)]
    assert "teacher      none: distillation.weight is 0, so distillation.teacher is not used" in lines


@pytest.mark.parametrize(
    ("rows", "line"),
    [
        (304, "304 rows, 4 more than the base's 300 (each starts as the mean of those); an export has 300"),
        (300, None),
    ],
)
def test_rows_that_pad_the_vocabulary_are_announced(
    data: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str], rows: int, line: str | None
) -> None:
    """Where they are added, and in a run from a base that has them."""
    first, second = retrofit(data, tmp_path / "first"), retrofit(data, tmp_path / "second")
    base = f"checkpoint.load_base={tmp_path / 'first' / 'checkpoints' / 'final'}"
    for command in ([first, f"model.vocab_size={rows}"], [second, f"model.vocab_size={rows}", base]):
        assert main(["retrofit", *command]) == 0
        found = [words.split(maxsplit=1)[1] for words in said(capsys) if words.startswith("  vocabulary ")]
        assert found == ([] if line is None else [line])


def test_tokens_of_the_tokenizer_are_announced_as_exported(
    data: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    small = tmp_path / "small"
    values = recipe_values(data, small, [{"kind": "pretrain", "steps": 1, "lr": LR}])
    train_tokenizer(["a"], 260, small / "tokenizer")
    write_recipe(small, values)
    text = ["some text to train on " * 40] * 8
    build_indexed_dataset(text, load_tokenizer(small / "tokenizer"), str(small / "train"))
    names = {"model.vocab_size": 280, "data.tokenizer": small / "tokenizer", "data.train": f"[{small / 'train'}]"}
    overrides = [f"{name}={value}" for name, value in names.items()]
    assert main(["retrofit", str(small / "recipe.yaml"), *overrides, "data.valid=[]"]) == 0
    base = f"checkpoint.load_base={small / 'checkpoints' / 'final'}"
    capsys.readouterr()
    assert main(["retrofit", retrofit(data, tmp_path / "run"), "model.vocab_size=304", base]) == 0
    assert "304 rows, 24 more than the base's 280 (each starts as the mean of those); an export has 300\n" in (
        capsys.readouterr().err
    )


def test_every_kept_checkpoint_is_named_with_its_ratio(
    data: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    assert main(["retrofit", retrofit(data, tmp_path)]) == 0
    text = "\n".join(said(capsys))
    for name in ("cr_2", "cr_3", "step_00000005", "final", "step_00000008"):
        ratio = json.loads((tmp_path / "checkpoints" / name / "dmc.json").read_text())["compression_ratio"]
        size = sum(path.stat().st_size for path in (tmp_path / "checkpoints" / name).rglob("*"))
        assert re.search(
            rf"^saved {name}: CR {ratio:.2f}(, below its target \d)? \((\d+\.\d) kB, \d+\.\d s\)$", text, re.M
        )
        assert re.search(rf"^saved {name}.*\({size / 1000:.1f} kB", text, re.M)


def test_saved_in_the_background_is_said_when_it_is_whole(
    data: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    assert main(["retrofit", retrofit(data, tmp_path), "checkpoint.async_save=true"]) == 0
    saved = [line.split()[1].rstrip(":") for line in said(capsys) if line.startswith("saved")]
    assert sorted(saved) == ["cr_2", "cr_3", "final", "step_00000005", "step_00000008"]


@pytest.mark.parametrize("shows", [True, False], ids=["shown", "no progress bar"])
def test_a_missed_target_is_reported(
    data: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str], shows: bool
) -> None:
    # Nothing pulls the ratio up.
    assert main(["retrofit", retrofit(data, tmp_path, shows=shows, loss_coefficient=0.0, decision_bias=5.0)]) == 0
    (warning,) = [line for line in said(capsys) if line.startswith("warning")]
    assert warning == (
        "warning: target missed: CR 1.00 on held-out samples, target 3; try a larger dmc.loss_coefficient, a higher learning "
        "rate, or more steps"
    )


def test_a_reached_target_is_not_reported(data: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    # Decisions begin at a = 1: all but the first token merge.
    assert main(["retrofit", retrofit(data, tmp_path, loss_coefficient=100.0, decision_bias=0.0)]) == 0
    assert not [line for line in said(capsys) if "target missed" in line]


def recipe(**last_phase: object) -> Recipe:
    values = recipe_values(Path("data"), Path("run"), [*PHASES[:1], {**PHASES[1], **last_phase}])
    return recipe_from_dict(values)


@pytest.mark.parametrize(
    ("held_out", "trained", "words"),
    [
        (4.0, 3.0, None),
        (3.8, 3.8, None),
        (2.93, 3.95, "CR 2.93 on held-out samples, target 4; training reached 3.95: try more varied text"),
        (2.93, 3.0, "CR 2.93 on held-out samples, target 4; try a larger dmc.loss_coefficient"),
        (None, 3.0, "CR 3.00 on the last training batch, target 4; try a larger"),
        (None, 4.0, None),
        (None, None, None),
    ],
)
def test_which_targets_are_missed(held_out: float | None, trained: float | None, words: str | None) -> None:
    warning = messages.missed_target(recipe(), held_out, trained)
    assert (warning is None) if words is None else (warning is not None and words in warning and "\n" not in warning)


def test_an_adapter_is_told_of_its_learning_rate_first() -> None:
    adapter = replace(recipe(), training=replace(recipe().training, train="adapter"))
    warning = messages.missed_target(adapter, 2.93, 3.0)
    assert warning is not None
    assert warning.endswith("; try a higher learning rate, a larger dmc.loss_coefficient, or more steps")


def test_a_ratio_that_is_held_may_not_go_beyond_its_target() -> None:
    held = replace(recipe(), dmc=replace(recipe().dmc, decision_source="projection", ratio_control="offset"))
    assert messages.missed_target(held, 4.39, 4.0) is None
    warning = messages.missed_target(held, 4.41, 4.0)
    assert warning is not None and "target exceeded: CR 4.41 on held-out samples, target 4; training reached" in warning
    assert "a lower target" in warning
    # The loss is one-sided.
    assert messages.missed_target(recipe(), 9.0, 9.0) is None


def test_settings_without_effect_are_named() -> None:
    def said(dmc: DMCConfig) -> str | None:
        return messages.without_effect(replace(recipe(), dmc=dmc))

    assert said(DMCConfig(omega_floor=0.1, loss_coefficient=2.0)) is None
    absorbing = DMCConfig(local_window=4, operation="absorb", ratio_control="offset")
    assert said(absorbing) is None
    assert said(replace(absorbing, omega_floor=0.1, loss_coefficient=2.0)) == (
        "warning: without effect: dmc.omega_floor with dmc.operation absorb, dmc.loss_coefficient with dmc.ratio_control "
        "offset"
    )


def test_where_nothing_is_trained_more_settings_are_without_effect() -> None:
    phase = PhaseConfig(kind="calibrate", steps=5)
    alone = replace(recipe(), phases=[phase], data=replace(recipe().data, repeat_fraction=None))
    assert messages.without_effect(alone) is None
    odd = replace(
        alone,
        phases=[replace(phase, lr=7.0, start_compression_ratio=3.0)],
        dmc=replace(alone.dmc, temperature=3.0),
        distillation=replace(alone.distillation, weight=1.0),
        data=replace(alone.data, repeat_fraction=0.0),
    )
    nothing_learns = "with phases of kind calibrate alone"
    assert messages.without_effect(odd) == (
        "warning: without effect: phases[0].lr with kind calibrate, phases[0].start_compression_ratio with kind calibrate, "
        f"dmc.temperature {nothing_learns}, distillation.weight {nothing_learns}, data.repeat_fraction {nothing_learns}"
    )
    # Before training they have one.
    trained = replace(odd, phases=[phase, PhaseConfig(kind="solidify", steps=5, lr=7.0)])
    assert messages.without_effect(trained) is None
    gap = messages.recall_behind(alone, 0.5)
    assert gap is not None and "repeat_fraction" not in gap
    assert messages.recall_behind(alone, math.nan) is None


def test_a_calibration_that_predicts_nothing() -> None:
    found = CalibrationResult(1000, torch.tensor([0.3, -0.1]), 0.75)
    assert messages.useless_calibration(found) is None
    warning = messages.useless_calibration(replace(found, r2=torch.tensor([0.1, -0.3])))
    assert warning is not None and "predicts nothing on other text" in warning


def test_a_checkpoint_below_its_ratio_says_so() -> None:
    info = CheckpointInfo("weights", {}, 10, 80, 0, compression_ratio=2.41)
    checkpoint = SavedCheckpoint("cr_3", info, 1_250_000, 0.25)
    assert messages.saved(checkpoint, 3.0) == "saved cr_3: CR 2.41, below its target 3 (1.2 MB, 0.2 s)"
    reached = replace(checkpoint, info=replace(info, compression_ratio=3.02))
    assert messages.saved(reached) == "saved cr_3: CR 3.02 (1.2 MB, 0.2 s)"
    nothing = replace(checkpoint, info=replace(info, compression_ratio=None))
    assert messages.saved(nothing) == "saved cr_3 (1.2 MB, 0.2 s)"
    below = [messages.is_below(x, target) for x in (checkpoint, reached, nothing) for target in (3.0, None)]
    assert below == [True, *[False] * 5]


def test_checkpoints_below_their_targets_are_counted(
    data: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """A line in each phase says it, and one at the end. Nothing pulls the ratio up."""
    path = retrofit(data, tmp_path, loss_coefficient=0.0, decision_bias=5.0)
    recipe = yaml.safe_load(Path(path).read_text())
    recipe["phases"] = [
        {"kind": "compress", "steps": 4, "lr": LR, "start_compression_ratio": ratio} for ratio in (2.0, 1.0)
    ]
    recipe["dmc"]["target_compression_ratio"] = 4.0
    write_recipe(tmp_path, recipe)
    assert main(["retrofit", path]) == 0
    lines = [line for line in said(capsys) if re.match(r"saved cr_|\d checkpoints", line)]
    assert [re.sub(r" \(.*\)", "", line) for line in lines] == [
        "saved cr_3: CR 1.00, below its target 3",
        "saved cr_4: CR 1.00",
        "saved cr_2: CR 1.00, below its target 2",
        "3 checkpoints were saved below their targets: cr_3, cr_4, cr_2",
    ]


def test_a_resumed_run_says_where_it_goes_on(data: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    path = retrofit(data, tmp_path)
    assert main(["retrofit", path, "training.exit_after_steps=2"]) == 0
    assert "held-out loss after 0 steps" in capsys.readouterr().err
    assert main(["retrofit", path, "training.exit_after_steps=2"]) == 0
    lines = said(capsys)
    assert f"resuming from step 2 of {tmp_path / 'checkpoints' / 'step_00000002'}" in lines
    assert not [line for line in lines if line.startswith("held-out")]


@pytest.mark.parametrize("shows", [True, False], ids=["shown", "no progress bar"])
def test_a_finished_recipe_says_so(data: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str], shows: bool) -> None:
    path = retrofit(data, tmp_path, shows=shows)
    assert main(["retrofit", path]) == 0
    capsys.readouterr()
    before = {path: path.stat().st_mtime_ns for path in tmp_path.rglob("*")}
    assert main(["retrofit", path]) == 0
    final = tmp_path / "checkpoints" / "final"
    ratio = json.loads((final / "dmc.json").read_text())["compression_ratio"]
    assert said(capsys) == [
        f"this run is finished: all 8 steps are done, CR {ratio:.2f} (target 3); its result is {final}",
        f"  to look at it: megatron-dmc inspect {final}",
        f"  to train on: a new checkpoint.directory with checkpoint.load_base={final}",
    ]
    # No empty event file either.
    assert {path: path.stat().st_mtime_ns for path in tmp_path.rglob("*")} == before


@pytest.mark.distributed
@pytest.mark.parametrize(
    ("adapter", "layout"),
    [
        (False, "parallel.pipeline_model_parallel_size=2"),
        (True, "parallel.tensor_model_parallel_size=2"),
        (False, "parallel.overlap=true"),
    ],
    ids=["PP2", "TP2 adapter", "DP2"],
)
def test_a_run_on_two_ranks_prints_no_warning(data: Path, tmp_path: Path, adapter: bool, layout: str) -> None:
    path = retrofit(data, tmp_path, adapter=adapter)
    launcher = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc-per-node=2"]
    environment = {name: value for name, value in os.environ.items() if name != "PYTHONWARNINGS"}
    done = subprocess.run(
        [*launcher, "-m", "megatron_dmc", "retrofit", path, layout],
        env={**environment, "OMP_NUM_THREADS": "1"},
        stderr=subprocess.PIPE,
        text=True,
        timeout=300,
    )
    assert done.returncode == 0, done.stderr
    words = (
        "megatron-dmc",
        "  ",
        "starting",
        "held-out",
        "saved",
        "compress |",
        "solidify |",
        "warning: target missed",
    )
    assert not [line for line in done.stderr.splitlines() if not line.startswith(words)]
    # The layout does not change how many there are.
    assert "  model        2 layers, 2 KV heads, 34,984 parameters\n" in done.stderr
    assert "  trains       264 of them" in done.stderr or not adapter
