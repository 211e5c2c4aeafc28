"""A finished retrofit: its checkpoints, the commands that read them, and runs that start from them."""

import json
import shutil
from pathlib import Path
from typing import Any

import pytest
import torch
from omegaconf import OmegaConf

from megatron_dmc.cli import main
from megatron_dmc.inference.loading import load_model
from tests.support.toy import LR, RETROFIT, recipe_values, train, write_recipe

pytestmark = pytest.mark.usefixtures("one_process")


@pytest.fixture(scope="module")
def finished(data: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The checkpoints of a finished retrofit to CR 3, from a pretrained base."""
    folder = tmp_path_factory.mktemp("finished")
    base = recipe_values(data, folder / "base", [{"kind": "pretrain", "steps": 3, "lr": LR}])
    train(write_recipe(folder / "base", base))
    values = recipe_values(data, folder / "dmc", RETROFIT, target_compression_ratio=3.0)
    values["checkpoint"]["load_base"] = str(folder / "base" / "checkpoints" / "final")
    train(write_recipe(folder / "dmc", values))
    return folder / "dmc" / "checkpoints"


def test_checkpoints_of_a_retrofit(finished: Path) -> None:
    kinds = {path.parent.name: json.loads(path.read_text())["kind"] for path in finished.glob("*/dmc.json")}
    assert kinds == {"cr_2": "weights", "cr_3": "weights", "final": "weights", "step_00000009": "full"}
    assert (finished / "latest").read_text().strip() == "step_00000009"


def test_base_starts_the_retrofit(finished: Path) -> None:
    base = load_model(finished.parents[1] / "base" / "checkpoints" / "final")
    assert not base.merges
    assert not any(".decision." in name for name, _ in base.model.named_parameters())
    assert load_model(finished / "final").merges


def test_finished_run_does_nothing_again(data: Path, finished: Path) -> None:
    before = {path: path.stat().st_mtime_ns for path in finished.rglob("*") if path.is_file()}
    assert main(["retrofit", str(finished.parent / "recipe.yaml")]) == 0
    assert {path: path.stat().st_mtime_ns for path in finished.rglob("*") if path.is_file()} == before


def test_a_result_that_was_removed_is_saved_again(finished: Path, tmp_path: Path) -> None:
    copy = tmp_path / "checkpoints"
    shutil.copytree(finished, copy)
    shutil.rmtree(copy / "final")
    assert main(["retrofit", str(finished.parent / "recipe.yaml"), f"checkpoint.directory={copy}"]) == 0
    before, again = (load_model(folder / "final") for folder in (finished, copy))
    assert again.compression_ratio == pytest.approx(before.compression_ratio)
    for (name, value), (_, other) in zip(before.model.named_parameters(), again.model.named_parameters(), strict=True):
        assert torch.equal(value, other), name


def test_a_run_does_not_replace_its_base(finished: Path, capsys: pytest.CaptureFixture[str]) -> None:
    base = finished.parents[1] / "base" / "checkpoints"
    before = (base / "final" / "dmc.json").read_text()
    assert main(["retrofit", str(finished.parent / "recipe.yaml"), f"checkpoint.directory={base}"]) == 1
    line = f"megatron-dmc: checkpoint.load_base {base}/final lies in checkpoint.directory {base}, where this run's"
    assert capsys.readouterr().err.startswith(line)
    assert (base / "final" / "dmc.json").read_text() == before


def test_inspect_shows_every_layer_and_head(finished: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["inspect", str(finished / "final"), "--tokens", "200", "--json"]) == 0
    report = json.loads(capsys.readouterr().out)
    assert report["tokens"] == 200
    ratios = torch.tensor(report["layer_head_compression_ratio"])
    assert ratios.shape == (2, 2)
    assert report["compression_ratio"] == pytest.approx(float(4 / (1 / ratios).sum()))
    assert main(["inspect", str(finished / "final"), "--tokens", "200"]) == 0
    assert "head 1" in capsys.readouterr().out


def test_generate_continues_the_prompt(finished: Path, capsys: pytest.CaptureFixture[str]) -> None:
    arguments = ["generate", str(finished / "final"), "--prompt", "The cat", "--max-new-tokens", "8"]
    assert main(arguments) == 0
    greedy = capsys.readouterr().out
    assert greedy.startswith("The cat")
    assert main(arguments) == 0
    assert capsys.readouterr().out == greedy
    assert main([*arguments, "--temperature", "1", "--seed", "3"]) == 0


@pytest.mark.parametrize(
    ("override", "message"),
    [
        ("dmc.temperature=0.2", "dmc.temperature=0.1"),
        ("training.global_batch_size=8", "training.global_batch_size=4"),
        ("model.vocab_size=304", "model.vocab_size=300"),
        ("data.reset_at_documents=true", "data.reset_at_documents=false"),
        ("distillation.weight=0.5", "distillation.weight=0.0"),
        ("phases.1.steps=4", "phases.1.steps=3"),
    ],
)
def test_resume_with_other_settings_is_refused(
    finished: Path, capsys: pytest.CaptureFixture[str], override: str, message: str
) -> None:
    name, _, value = override.partition("=")
    assert main(["retrofit", str(finished.parent / "recipe.yaml"), override]) == 1
    said = capsys.readouterr().err
    assert f"{name} is {value}, but {finished}/step_00000009 was trained with " in said and said.count("\n") == 1
    assert f"; set {message} again, or start in a new checkpoint.directory with checkpoint.load_base" in said


def test_settings_without_effect_may_differ(finished: Path) -> None:
    overrides = ["distillation.temperature=2", "distillation.direction=reverse", "training.seed=7"]
    assert main(["retrofit", str(finished.parent / "recipe.yaml"), *overrides]) == 0


def test_resume_with_other_phases_is_refused(finished: Path, capsys: pytest.CaptureFixture[str]) -> None:
    recipe = str(finished.parent / "recipe.yaml")
    assert main(["retrofit", recipe, "phases=[{kind: compress, steps: 6}]"]) == 1
    assert f"phases are 1, but {finished}/step_00000009 was trained with 2; set them back" in capsys.readouterr().err


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"kind": "weights"}, "latest names step_00000009, which holds weights only"),
        ({"recipe": {"dmc": {"novelty": 1}}}, "step_00000009/dmc.json holds a recipe that this version"),
        ({"datasets": None}, None),
    ],
    ids=["weights", "newer recipe", "older description"],
)
def test_resume_reads_the_description(
    finished: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str], change: dict[str, Any], message: str | None
) -> None:
    shutil.copytree(finished, tmp_path / "checkpoints")
    path = tmp_path / "checkpoints" / "step_00000009" / "dmc.json"
    path.write_text(json.dumps(OmegaConf.to_container(OmegaConf.merge(json.loads(path.read_text()), change))))
    arguments = [str(finished.parent / "recipe.yaml"), f"checkpoint.directory={tmp_path / 'checkpoints'}"]
    assert main(["retrofit", *arguments]) == (0 if message is None else 1)
    assert message is None or message in capsys.readouterr().err


@pytest.mark.parametrize(
    ("overrides", "message"),
    [
        (["dmc.decision_scale=3"], "dmc.decision_scale is 3.0"),
        (["dmc.decision_source=neuron"], "dmc.decision_source"),
        (["dmc.per_layer=true"], "dmc.per_layer"),
        (["phases=[{kind: pretrain, steps: 2, lr: 1e-3}]"], "no phase merges"),
    ],
)
def test_a_retrofit_is_not_taken_for_another_model(
    data: Path, finished: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str], overrides: list[str], message: str
) -> None:
    values = recipe_values(data, tmp_path, RETROFIT)
    values["checkpoint"]["load_base"] = str(finished / "final")
    assert main(["retrofit", str(write_recipe(tmp_path, values)), *overrides]) == 1
    assert message in capsys.readouterr().err


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["--temperature", "nan"], "--temperature"),
        (["--temperature", "1e-45"], "--temperature"),
        (["--seed", str(10**22)], "--seed"),
        (["--max-new-tokens", "99999999999"], "positions"),
        (["--max-new-tokens", "0"], "--max-new-tokens"),
        (["--prompt", "\udcff"], "--prompt"),
        (["--prompt", ""], "--prompt"),
    ],
)
def test_bad_arguments_of_generate_end_in_one_line(
    finished: Path, capsys: pytest.CaptureFixture[str], arguments: list[str], message: str
) -> None:
    assert main(["generate", str(finished / "final"), "--prompt", "The cat", *arguments]) == 1
    captured = capsys.readouterr()
    assert message in captured.err and not captured.out


def test_base_of_another_size_is_refused(data: Path, finished: Path, tmp_path: Path) -> None:
    values = recipe_values(data, tmp_path, RETROFIT)
    values["model"]["num_layers"] = 3
    values["checkpoint"]["load_base"] = str(finished / "final")
    assert main(["retrofit", str(write_recipe(tmp_path, values))]) == 1
