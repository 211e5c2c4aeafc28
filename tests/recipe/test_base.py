"""The model section comes from the base checkpoint; what a recipe says of it itself must agree."""

import json
import shutil
from pathlib import Path
from typing import Any

import pytest
import yaml

from megatron_dmc.__main__ import main
from megatron_dmc.config import ConfigError
from megatron_dmc.recipe import Recipe, load_recipe, recipe_from_dict
from megatron_dmc.recipe.base import model_differences, vocabulary_of_base
from tests.support.processes import ROOT

QUICKSTART = ROOT / "examples" / "quickstart"
# What float32 makes of 1e-5: checkpoints converted by other tools say this.
ROUNDED = 9.999999747378752e-06


@pytest.fixture
def base(tmp_path: Path) -> Path:
    """A base's description; nothing else of a checkpoint is needed to read a recipe."""
    recipe = load_recipe(QUICKSTART / "base.yaml", ["model.rotary_base=500000", "model.norm_epsilon=1e-6"])
    folder = tmp_path / "base"
    folder.mkdir()
    (folder / "dmc.json").write_text(json.dumps({"kind": "weights", "recipe": recipe.to_dict()}))
    return folder


def write(folder: Path, load_base: Path | None, **model: Any) -> Path:
    values = yaml.safe_load((QUICKSTART / "base.yaml").read_text())
    values["model"] = model
    values["checkpoint"]["load_base"] = None if load_base is None else str(load_base)
    path = folder / "recipe.yaml"
    path.write_text(yaml.safe_dump(values))
    return path


def read(folder: Path, load_base: Path | None, **model: Any) -> Recipe:
    return load_recipe(write(folder, load_base, **model))


def test_the_model_is_taken_from_the_base(tmp_path: Path, base: Path) -> None:
    recipe = read(tmp_path, base)
    assert recipe.to_dict()["model"] == json.loads((base / "dmc.json").read_text())["recipe"]["model"]
    assert (recipe.model.num_layers, recipe.model.rotary_base, recipe.model.norm_epsilon) == (4, 500000.0, 1e-6)
    # What a checkpoint of the run would hold is whole: it needs no base to be read.
    values = json.loads(json.dumps(recipe.to_dict()))
    shutil.rmtree(base)
    assert recipe_from_dict(values) == recipe


def test_a_recipe_without_the_section_takes_an_override(tmp_path: Path, base: Path) -> None:
    values = yaml.safe_load((QUICKSTART / "base.yaml").read_text())
    del values["model"]
    path = tmp_path / "recipe.yaml"
    path.write_text(yaml.safe_dump(values))
    assert load_recipe(path, [f"checkpoint.load_base={base}"]).model.hidden_size == 128
    assert load_recipe(path, [f"checkpoint.load_base={base}", "model.init_method_std=0.5"]).model.init_method_std == 0.5


def test_a_model_of_nothing_is_taken_from_the_base(tmp_path: Path, base: Path) -> None:
    """A recipe that writes its model out, and an override that takes it back."""
    path = write(tmp_path, base, hidden_size=256)
    for text in ("", "null", "~"):
        assert load_recipe(path, [f"model={text}"]).model.hidden_size == 128
        assert load_recipe(path, [f"model={text}", "model.init_method_std=0.5"]).model.init_method_std == 0.5
    for text in ("${oc.env:DMC_NOT_SET,null}", "${distillation.teacher}"):
        assert load_recipe(path, [f"model={text}"]).model.hidden_size == 128


def test_what_does_not_change_the_weights_may_differ(tmp_path: Path, base: Path) -> None:
    model = read(tmp_path, base, max_position_embeddings=4096, init_method_std=0.01, kv_channels=32).model
    assert (model.max_position_embeddings, model.init_method_std, model.kv_channels) == (4096, 0.01, 32)


@pytest.mark.parametrize(
    ("model", "message"),
    [
        ({"hidden_size": 256}, "model.hidden_size is 128 there, 256 here; "),
        ({"rotary_base": 10000.0}, "model.rotary_base is 500000.0 there, 10000.0 here; "),
        ({"norm_epsilon": 1e-5}, "model.norm_epsilon is 1e-06 there, 1e-05 here; "),
        ({"kv_channels": 64}, "model.kv_channels is 32 there, 64 here; "),
        ({"share_embeddings_and_output_weights": True}, "is false there, true here; "),
        ({"rotary_scaling_factor": 8.0}, "model.rotary_scaling_factor is null there, 8.0 here; "),
    ],
)  # fmt: skip
def test_another_model_than_the_bases_is_refused(
    tmp_path: Path, base: Path, model: dict[str, Any], message: str
) -> None:
    with pytest.raises(ConfigError) as caught:
        read(tmp_path, base, **model)
    assert message in str(caught.value) and "\n" not in str(caught.value)
    assert f"the model section is not that of checkpoint.load_base {base}: " in str(caught.value)
    assert "leave the section out (model=null: it is then taken from the base), or name another base" in str(
        caught.value
    )


def test_many_differences_are_all_named(tmp_path: Path, base: Path) -> None:
    """A recipe for a large model with a small base."""
    sizes = {"num_layers": 32, "hidden_size": 4096, "ffn_hidden_size": 11008, "num_attention_heads": 32}
    with pytest.raises(ConfigError) as caught:
        read(tmp_path, base, **sizes, num_query_groups=32, vocab_size=32000, norm_epsilon=1e-5)
    said = str(caught.value).partition(f"load_base {base}: ")[2]
    assert said == (
        "model.ffn_hidden_size is 352 there, 11008 here; model.hidden_size is 128 there, 4096 here; model.kv_channels is 32 "
        "there, 128 here; model.norm_epsilon, model.num_attention_heads, model.num_layers, model.num_query_groups, "
        "model.vocab_size differ too; leave the section out (model=null: it is then taken from the base), "
        "or name another base (for a plan, one that is not here will do)"
    )


def test_a_rounding_to_float32_is_no_difference(tmp_path: Path, base: Path) -> None:
    info = json.loads((base / "dmc.json").read_text())
    info["recipe"]["model"] |= {"norm_epsilon": ROUNDED, "rotary_base": 500000, "rotary_scaling_factor": 8.1}
    (base / "dmc.json").write_text(json.dumps(info))
    model = read(tmp_path, base, norm_epsilon=1e-5, rotary_base=500000.0, rotary_scaling_factor=8.100000381469727).model
    assert (model.norm_epsilon, model.rotary_scaling_factor) == (1e-5, 8.100000381469727)
    with pytest.raises(ConfigError, match=r"model.norm_epsilon is 9.99\d*e-06 .*, 1.00001e-05 here"):
        read(tmp_path, base, norm_epsilon=1.00001e-5)
    # Whole numbers are no floats: float32 rounds 16777217 to 16777216.
    assert not model_differences({"rotary_base": 10000}, {"rotary_base": 10000.0})
    assert model_differences({"vocab_size": 16777217}, {"vocab_size": 16777216})
    assert model_differences({"rotary_base": 1e300}, {"rotary_base": 10000.0})
    # Both are too large for float32.
    assert model_differences({"rotary_base": 1e300}, {"rotary_base": 1e299})


def test_without_a_base_the_model_is_written_out(tmp_path: Path, base: Path) -> None:
    with pytest.raises(ConfigError) as caught:
        read(tmp_path, None, num_layers=4)
    assert "model.hidden_size, model.ffn_hidden_size, model.num_attention_heads, " in str(caught.value)
    assert "must be given; or name a base in checkpoint.load_base: the model section is taken" in str(caught.value)
    assert "num_layers" not in str(caught.value) and "\n" not in str(caught.value)


@pytest.mark.parametrize(
    "sizes", [{}, yaml.safe_load((QUICKSTART / "base.yaml").read_text())["model"]], ids=["taken", "given"]
)
def test_what_is_no_base_is_said_to_be_what_it_is(tmp_path: Path, base: Path, sizes: dict[str, Any]) -> None:
    hugging_face = tmp_path / "llama"
    hugging_face.mkdir()
    (hugging_face / "config.json").write_text("{}")
    for wrong, what in (
        (
            hugging_face,
            f"is a Hugging Face model, .*: run megatron-dmc convert-from-hf {hugging_face} BASE first, and name BASE",
        ),
        (hugging_face / "config.json", "is a file, not a folder; name the folder of one checkpoint"),
        (base.parent, f"is a folder of checkpoints; name one checkpoint, such as {base.parent}/"),
    ):
        with pytest.raises(ConfigError, match=f"checkpoint.load_base: {wrong} {what}"):
            read(tmp_path, wrong, **sizes)


def test_a_base_elsewhere_needs_the_model_written_out(
    tmp_path: Path, base: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """``plan`` runs on any machine."""
    elsewhere = tmp_path / "elsewhere"
    path = write(tmp_path, elsewhere)
    assert main(["plan", str(path), "--nodes", "1", "--gpus-per-node", "1"]) == 2
    error = capsys.readouterr().err.strip()
    assert "model.num_layers, model.hidden_size" in error and "\n" not in error
    assert f"checkpoint.load_base, but {elsewhere}/dmc.json is not on this machine: write the section, or" in error
    sizes = yaml.safe_load((QUICKSTART / "base.yaml").read_text())["model"]
    assert read(tmp_path, elsewhere, **sizes).model.num_layers == 4


def test_a_plan_of_another_base_is_refused_as_the_run_is(
    tmp_path: Path, base: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """A stand-in lies where the recipe names its base. What the line advises works."""
    path = write(tmp_path, base, hidden_size=256, **{"num_layers": 4, "ffn_hidden_size": 352, "num_attention_heads": 4})
    said = []
    for command in (["plan", "--nodes", "1", "--gpus-per-node", "1"], ["retrofit"]):
        assert main([command[0], str(path), *command[1:]]) != 0
        said.append(capsys.readouterr().err)
    assert said[0] == said[1] and "model.hidden_size is 128 there, 256 here" in said[0]
    assert "for a plan, one that is not here will do" in said[0]
    assert load_recipe(path, ["model=null"]).model.hidden_size == 128
    sizes = ["model.num_query_groups=2", "model.vocab_size=2048", "model.max_position_embeddings=2048"]
    assert load_recipe(path, [f"checkpoint.load_base={tmp_path}/elsewhere", *sizes]).model.hidden_size == 256


@pytest.mark.parametrize(
    ("content", "message"),
    [
        ("{", "is damaged, it holds no model section"),
        (f'{{"step": {"9" * 10000}}}', "is damaged, it holds no model section (a number of thousands of digits)"),
        ('{"recipe": []}', "is damaged, it holds no model section"),
        ('{"recipe": {"model": {"num_layers": 4}}}', "is damaged, it lacks model.hidden_size, model.ffn_hidden_size"),
        ('{"recipe": {"model": {"num_experts": 4}}}', "is not understood by this version: model.num_experts is no setting"),
        ('{"recipe": {"model": {"num_layers": "four"}}}', "model.num_layers must be a whole number"),
        ('{"recipe": {"model": 5}}', "model must hold settings"),
    ],
)  # fmt: skip
def test_a_damaged_description_is_refused(tmp_path: Path, base: Path, content: str, message: str) -> None:
    (base / "dmc.json").write_text(content)
    with pytest.raises(ConfigError) as caught:
        read(tmp_path, base)
    assert f"checkpoint.load_base: {base}/dmc.json " in str(caught.value) and message in str(caught.value)
    assert "\n" not in str(caught.value)


@pytest.mark.parametrize(
    ("noted", "known"), [(None, 2048), (2000, 2000), ("abc", 2048), (True, 2048), ([1], 2048), (-1, 2048)]
)
def test_a_damaged_number_of_tokens_is_left_to_the_loading(base: Path, noted: Any, known: int) -> None:
    values = json.loads((base / "dmc.json").read_text())
    (base / "dmc.json").write_text(json.dumps(values | {"vocabulary": noted}))
    assert vocabulary_of_base(str(base)) == known
