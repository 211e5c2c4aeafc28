"""What a word or a number means is decided by the type of its setting, in a recipe and in an override alike."""

import json
import re
from itertools import pairwise
from pathlib import Path
from typing import Any

import pytest
import yaml

from megatron_dmc.config import ConfigError, DMCConfig
from megatron_dmc.recipe import Recipe, load_recipe, recipe_from_dict
from tests.support.processes import ROOT
from tests.support.settings import settings_of

BASE = ROOT / "examples" / "quickstart" / "base.yaml"


def setting(recipe: Recipe, name: str) -> Any:
    value: Any = recipe
    for part in name.split("."):
        value = value[int(part)] if part.isdecimal() else getattr(value, part)
    return value


def read_both(tmp_path: Path, name: str, text: str) -> list[Recipe | ConfigError]:
    """A setting's text as an override, and as a line of the file."""
    *_, section, last = name.split(".")
    plain = re.sub(r"(?<=phases:\n).*\n", "  - kind: pretrain\n    steps: 240\n", BASE.read_text())
    lines = [line for line in plain.splitlines() if line.split(":")[0].strip() != last]
    head, indent = ("  - kind: pretrain", "    ") if section == "0" else (f"{section}:", "  ")
    if head not in lines:
        lines.append(head)
    lines.insert(lines.index(head) + 1, f"{indent}{last}: {text}")
    results: list[Recipe | ConfigError] = []
    for content, overrides in ((plain, [f"{name}={text}"]), ("\n".join(lines), [])):
        path = tmp_path / "recipe.yaml"
        path.write_text(content)
        try:
            results.append(load_recipe(path, overrides))
        except ConfigError as error:
            results.append(error)
    return results


@pytest.mark.parametrize("text", ["", "null", "None", "~", "{}"])
def test_a_section_of_nothing_has_its_defaults(tmp_path: Path, text: str) -> None:
    path = tmp_path / "recipe.yaml"
    path.write_text(BASE.read_text() + "dmc: {seed: 5}\n")
    assert load_recipe(path).dmc.seed == 5
    if text != "{}":  # an override of settings changes those that it names
        assert load_recipe(path, [f"dmc={text}"]).dmc == DMCConfig()
        assert load_recipe(path, [f"dmc={text}", "dmc.seed=7"]).dmc.seed == 7
    path.write_text(BASE.read_text() + f"dmc: {text}\n")
    assert load_recipe(path).dmc == DMCConfig()
    assert load_recipe(path, ["dmc.seed=7"]).dmc.seed == 7
    with pytest.raises(ConfigError, match=r"phases\[0\].kind, phases\[0\].steps must be given"):
        load_recipe(path, [f"phases=[{text or 'null'}]"])


@pytest.mark.parametrize(
    "override",
    [
        *(f"{name}={'9' * 10000}" for name in ("phases.0.steps", "training.seed", "training.weight_decay", "dmc.seed")),
        *(f"{name}={'9' * 10000}" for name in ("data.train", "training.train", "training", "phases", "data.tokenizer")),
        *(f"phases{place}.steps=1" for place in (f".{'9' * 10000}", f"[{'9' * 10000}]")),
        *(f"training.{'9' * 10000}=1", f"{'9' * 10000}.seed=1", f"data.train=[{'9' * 10000}]", "9" * 10000),
        *(
            f"training.seed={'9_' * 5000}9",
            f"training.bf16={'x' * 10000}",
            f"training={'[1, 2, ' * 90}",
            f"{'x' * 10000}",
        ),
        *(
            f"training.{'x' * 10000}=1",
            f"training.seed=${{oc.decode:{'9' * 10000}}}",
            f"training.seed=${{{'x' * 10000}}}",
        ),
        *(f"training.seed.{'x' * 10000}=1", f"phases={'x' * 10000}", f"phases.0=[{'1, ' * 10000}1]"),
    ],
    ids=lambda override: re.sub(r"(.)\1{9,}", r"\1...", override)[:40],
)
def test_a_value_of_ten_thousand_characters_is_one_short_line(override: str) -> None:
    with pytest.raises(ConfigError) as caught:
        load_recipe(BASE, [override])
    assert len(str(caught.value)) < 600 and "\n" not in str(caught.value) and "set_int_max_str" not in str(caught.value)


@pytest.mark.parametrize("text", ["None", "none", "null", "Null", "NULL", "~", "", "'null'"])
@pytest.mark.parametrize(
    "name",
    [
        *("monitor.tensorboard", "checkpoint.load_base", "distillation.teacher", "training.fp8"),
        *("training.exit_after_steps", "dmc.window_size", "model.kv_channels", "model.rotary_scaling_factor"),
        *("phases.0.min_lr", "parallel.virtual_pipeline_model_parallel_size"),
    ],
)
def test_words_for_nothing_are_null_where_null_may_be(tmp_path: Path, name: str, text: str) -> None:
    for recipe in read_both(tmp_path, name, text):
        assert isinstance(recipe, Recipe), recipe
        assert setting(recipe, name) is None


@pytest.mark.parametrize(
    ("name", "text", "value"),
    [
        ("training.adam_eps", "1e-4", 1e-4),
        ("training.adam_eps", "'1e-4'", 1e-4),
        ("training.weight_decay", "0", 0.0),
        ("training.clip_grad", "1_000", 1000.0),
        ("phases.0.lr", "3e-5", 3e-5),
        ("phases.0.steps", "100.0", 100),
        ("training.seed", "1_000", 1000),
        ("training.seed", "1e3", 1000),
        ("training.seed", "+7", 7),
        ("training.bf16", "Yes", True),
        ("training.bf16", "off", False),
        ("training.recompute", "none", "none"),
        # Names stay as they are written: YAML 1.1 reads 8, 90 and 1000 here.
        ("data.cache", "010", "010"),
        ("data.cache", "1:30", "1:30"),
        ("data.cache", "1_000", "1_000"),
        ("data.cache", "2024-01-01", "2024-01-01"),
        ("data.cache", "./None", "./None"),
        ("data.train", "[010, a]", ["010", "a"]),
    ],
)
def test_text_is_read_as_its_settings_type(tmp_path: Path, name: str, text: str, value: Any) -> None:
    for recipe in read_both(tmp_path, name, text):
        assert isinstance(recipe, Recipe), recipe
        assert setting(recipe, name) == value and type(setting(recipe, name)) is type(value)


@pytest.mark.parametrize(
    ("name", "text", "message"),
    [
        *(
            (name, word, f"{name} must be the name of a folder or file, got {word}, or write null for none (./{word} is")
            for name in ("monitor.tensorboard", "checkpoint.load_base", "distillation.teacher")
            for word in ("false", "no", "off", "True")
        ),
        ("monitor.tensorboard", "''", "monitor.tensorboard is empty; name a folder or file, or write null for none"),
        ("checkpoint.load_base", "' '", "checkpoint.load_base is empty; name a folder or file, or write null for none"),
        ("data.tokenizer", "''", "data.tokenizer is empty; name a folder or file"),
        ("data.tokenizer", "None", "data.tokenizer must be the name of a folder or file, got None (./None is a folder"),
        ("checkpoint.directory", "false", "checkpoint.directory must be the name of a folder or file, got false"),
        ("checkpoint.directory", "", "checkpoint.directory must be the name of a folder or file, got null"),
        ("data.train", "[a, no]", "data.train[1] must be the name of a folder or file, got no"),
        ("data.train", "['']", "data.train[0] is empty; name a folder or file"),
        ("monitor.tensorboard", "s3://bucket/tb", "is an address, s3://bucket/tb; name a folder or file, or write null"),
        ("data.train", "[a, hf://b]", "data.train[1] is an address, hf://b; name a folder or file"),
        ("data.valid", "null", "data.valid must be a list, got null; write [a, b], for one [a], for none []"),
        ("training.fp8", "off", "training.fp8 must be one of e4m3, hybrid, or null, got off"),
        ("training.recompute", "None", "must be one of none, selective, full, got None; did you mean none?"),
        ("training.recompute", "Full", "must be one of none, selective, full, got 'Full'; did you mean full?"),
        ("training.exit_after_steps", "off", "must be a whole number in decimal digits, or null, got off"),
        ("dmc.local_window", "None", "dmc.local_window must be a whole number in decimal digits, got None"),
        ("dmc.per_layer", "1", "dmc.per_layer must be true or false, got 1"),
        ("training.seed", "true", "training.seed must be a whole number in decimal digits, got true"),
        ("training.seed", "1.5", "training.seed must be a whole number in decimal digits, got 1.5"),
        ("training.seed", "1e40", "training.seed must be a whole number in decimal digits, got 1e40"),
        ("training.seed", "010", "training.seed must be a whole number in decimal digits, got '010'"),
        ("training.seed", "0x10", "training.seed must be a whole number in decimal digits, got '0x10'"),
        ("training.seed", "1:30", "training.seed must be a whole number in decimal digits, got '1:30'"),
        ("training.adam_eps", "small", "training.adam_eps must be a number in decimal digits, got 'small'"),
        ("training.adam_eps", "{x: 1}", "training.adam_eps must be a number in decimal digits, got {x: 1}"),
        ("training.weight_decay", ".nan", "training.weight_decay must be a finite number, got nan"),
        ("data.cache", "${oc.env:DMC_NO_SUCH}", "data.cache needs the environment variable DMC_NO_SUCH, which is not set"),
        ("data.cache", "${data.no_such}", "data.cache: Interpolation key 'data.no_such' not found"),
    ],
)  # fmt: skip
def test_what_means_nothing_for_the_type_is_refused(tmp_path: Path, name: str, text: str, message: str) -> None:
    for error in read_both(tmp_path, name, text):
        assert isinstance(error, ConfigError), f"{name} was taken for {setting(error, name)!r}"
        assert message in str(error) and "\n" not in str(error)


@pytest.mark.parametrize(
    ("override", "message"),
    [
        ("training.micro_batchsize=3", "training.micro_batchsize is no setting; did you mean training.micro_batch_size?"),
        ("training.sequence_length=3", "training.sequence_length is no setting; did you mean data.sequence_length?"),
        ("sequence_length=3", "sequence_length is no setting; did you mean data.sequence_length?"),
        ("trainin.seed=3", "trainin is no setting; did you mean training?"),
        ("phases.0.step=3", "phases[0].step is no setting; did you mean phases[0].steps?"),
        ("dmc.banana=3", "dmc.banana is no setting; dmc has target_compression_ratio, decision_source,"),
        ("phases.7.steps=3", "phases has no entry '7'; its 1 entries are counted from 0"),
        ("phases.first.steps=3", "phases has no entry 'first'"),
        ("data.train.0.x=3", "data.train.0 is 'data/train', it holds no setting 'x'"),
        ("dmc={seed: 1, seed: 2}", "line 1: seed is given twice"),
        ("data.train=[", "it is not YAML: line 1, column 2"),
    ],
)  # fmt: skip
def test_overrides_that_reach_nothing_are_refused(override: str, message: str) -> None:
    with pytest.raises(ConfigError) as caught:
        load_recipe(BASE, [override])
    assert message in str(caught.value) and "\n" not in str(caught.value)


def test_overrides_merge_into_sections_and_replace_lists() -> None:
    recipe = load_recipe(
        BASE, ["training={seed: 5, micro_batch_size: 4}", "phases[0]={steps: 90}", "data.valid=[a, b]"]
    )
    assert (recipe.training.seed, recipe.training.micro_batch_size, recipe.training.global_batch_size) == (5, 4, 8)
    assert (recipe.phases[0].steps, recipe.phases[0].lr) == (90, 2e-3)
    assert recipe.data.valid == ["a", "b"]
    phases = load_recipe(BASE, ["phases=[{kind: pretrain, steps: 3, lr: 1e-3}]"]).phases
    assert [(phase.steps, phase.lr, phase.lr_warmup_steps) for phase in phases] == [(3, 1e-3, 0)]


@pytest.mark.parametrize(
    ("before", "after", "message"),
    [
        ("  bf16: false\n", "  bf16: false\n  micro_batch_size: 4\n", "micro_batch_size is given twice (first in line"),
        ("monitor:", "data:\n  seed: 1\nmonitor:", "data is given twice (first in line 11); remove one"),
        ("  bf16", "\tbf16", "it is not YAML: line 22, column 1: a tab stands where only spaces may"),
        (
            "bf16: false",
            "bf16: !!python/name:os.system x",
            "line 22: !!python/name:os.system is a YAML tag, a recipe has none; write the value alone",
        ),
        ("data:", "data: [", "it is not YAML: line 13, column 3: "),
    ],
    ids=["twice", "section twice", "tab", "tag", "bracket"],
)
def test_a_damaged_file_is_refused_by_line(tmp_path: Path, before: str, after: str, message: str) -> None:
    path = tmp_path / "recipe.yaml"
    assert before in BASE.read_text()
    path.write_text(BASE.read_text().replace(before, after))
    with pytest.raises(ConfigError) as caught:
        load_recipe(path)
    assert f"recipe {path}: " in str(caught.value) and message in str(caught.value) and "\n" not in str(caught.value)


TAGS = (
    *("!!int x", "!!float x", "!!timestamp x", "!!binary x", "!!set {a}", "!!omap [a: b]", "!!str x", "!!null x"),
    *("!!python/object:os.system {}", "!!python/object/apply:os.system [ls]", "!own x", "! x", "!<tag:x> y"),
)


@pytest.mark.parametrize("text", TAGS)
@pytest.mark.parametrize("name", ["model.hidden_size", "data.cache", "training.fp8"])
def test_tags_construct_nothing(tmp_path: Path, name: str, text: str) -> None:
    for error in read_both(tmp_path, name, text):
        assert isinstance(error, ConfigError), f"{name} was taken for {setting(error, name)!r}"
        assert "is a YAML tag, a recipe has none; write the value alone" in str(error) and "\n" not in str(error)


@pytest.mark.parametrize(
    ("link", "message"),
    [
        ("[{}]", "its aliases spread to more than 100000 entries"),
        # PyYAML 6.0.4 merges equal settings as it reads them: what is left is a section of an unknown name.
        ("{{<<: [{}]}}", "line 7: << merges more than 100000 settings|a is no setting"),
    ],
)
def test_aliases_of_aliases_do_not_fill_the_memory(tmp_path: Path, link: str, message: str) -> None:
    path = tmp_path / "recipe.yaml"
    names = "abcdefghijkl"
    lines = [f"{after}: &{after} {link.format(','.join([f'*{name}'] * 9))}" for name, after in pairwise(names)]
    path.write_text("\n".join(["a: &a {x: 1}", *lines]))
    with pytest.raises(ConfigError, match=message):
        load_recipe(path)


PATHS = [name for name, _, _ in settings_of(str)]


@pytest.mark.parametrize(
    ("text", "message"),
    [
        (r'"a\0b"', "holds the character U+0000; remove it"),
        (r'"a\nb"', "holds the character U+000A; remove it"),
        (r'"a\e[31mb"', "holds the character U+001B; remove it"),
        (r'"a\ud800b"', "holds the character U+D800; remove it"),
        (r'"a\Lb"', "holds the character U+2028; remove it"),
        ("x" * 256, "has 256 characters; one name may have 255 bytes, a path 4095"),
        ("é" * 128, "has 128 characters; one name may have 255 bytes, a path 4095"),
        ("ab/" * 1500, "has 4500 characters; one name may have 255 bytes, a path 4095"),
    ],
    ids=["NUL", "line break", "escape", "surrogate", "separator", "long name", "long in bytes", "long path"],
)
@pytest.mark.parametrize("name", PATHS)
def test_what_no_path_can_hold_is_refused(tmp_path: Path, name: str, text: str, message: str) -> None:
    assert {"data.cache", "data.train", "monitor.tensorboard", "distillation.teacher"} <= {*PATHS}
    is_list = name in ("data.train", "data.valid")
    for error in read_both(tmp_path, name, f"[{text}]" if is_list else text):
        assert isinstance(error, ConfigError)
        assert f"{name}{'[0]' * is_list} cannot be the name of a folder or file: " in str(error)
        assert message in str(error) and str(error).isprintable()


@pytest.mark.parametrize("text", ["x" * 255, "Ünï cødé/日本/\u200d", "a b", "$HOME", "~/x", "a:b"])
def test_unusual_paths_are_taken(tmp_path: Path, text: str) -> None:
    for recipe in read_both(tmp_path, "data.cache", text):
        assert isinstance(recipe, Recipe) and recipe.data.cache == text


def test_anchors_share_text_but_not_overrides(tmp_path: Path) -> None:
    path = tmp_path / "recipe.yaml"
    phases = "  - &first {kind: pretrain, steps: 5, lr: 1e-3}\n  - *first\n  - {<<: *first, steps: 7}\n"
    path.write_text(BASE.read_text().split("phases:")[0] + "phases:\n" + phases)
    path.write_text(path.read_text() + "training: {global_batch_size: 8}\ncheckpoint: {directory: runs}\n")
    steps = [phase.steps for phase in load_recipe(path, ["phases.0.steps=6"]).phases]
    assert steps == [6, 5, 7]
    path.write_text("data: &itself\n  train: *itself\n")
    with pytest.raises(ConfigError, match="it holds itself"):
        load_recipe(path)


def test_interpolations_name_other_settings_and_the_environment(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("DMC_CACHE", "None")
    assert load_recipe(BASE, ["dmc.seed=${training.seed}", "training.seed=7"]).dmc.seed == 7
    assert load_recipe(BASE, ["training.seed=${dmc.seed}"]).training.seed == 1234
    assert load_recipe(BASE, ["monitor.tensorboard=${oc.env:DMC_CACHE}"]).monitor.tensorboard is None
    assert load_recipe(BASE, ["data.cache=${oc.env:DMC_NO_SUCH,there}/x"]).data.cache == "there/x"


def test_every_missing_setting_is_named_in_one_line(tmp_path: Path) -> None:
    path = tmp_path / "recipe.yaml"
    values = yaml.safe_load(BASE.read_text())
    del values["checkpoint"]["directory"], values["data"]["cache"], values["phases"][0]["kind"]
    path.write_text(yaml.safe_dump(values))
    with pytest.raises(ConfigError, match=r": data.cache, phases\[0\].kind, checkpoint.directory must be given$"):
        load_recipe(path)
    path.write_text("")
    with pytest.raises(ConfigError, match=r"model.num_layers, .*, data.train, .* must be given"):
        load_recipe(path)


def test_an_empty_section_has_its_defaults(tmp_path: Path) -> None:
    path = tmp_path / "recipe.yaml"
    path.write_text(BASE.read_text() + "distillation:\n")
    assert load_recipe(path).distillation.weight == 0


def test_a_saved_recipe_keeps_its_text() -> None:
    """Older versions saved ``monitor.tensorboard: false`` as the text False: such a checkpoint can still be read."""
    recipe = load_recipe(BASE)
    values = json.loads(json.dumps(recipe.to_dict()))
    assert recipe_from_dict(values) == recipe
    values["monitor"]["tensorboard"] = "False"
    values["data"]["tokenizer"] = "none"
    saved = recipe_from_dict(values)
    assert (saved.monitor.tensorboard, saved.data.tokenizer) == ("False", "none")
    for section, name, value in (("monitor", "tensorboard", False), ("training", "seed", True), ("dmc", "seed", None)):
        with pytest.raises(ConfigError, match=f"{section}.{name} must be"):
            recipe_from_dict(values | {section: values[section] | {name: value}})
    with pytest.raises(ConfigError, match="a recipe must hold settings"):
        recipe_from_dict(["model"])  # type: ignore[arg-type]
