"""Recipes: the examples are valid, overrides are typed, targets and checkpoints follow the phases."""

import ast
from pathlib import Path

import pytest

from megatron_dmc.config import ConfigError, DMCConfig
from megatron_dmc.recipe import PhaseConfig, load_recipe, recipe_from_dict
from megatron_dmc.training.schedule import integer_ratios, plan_step
from tests.support.processes import ROOT
from tests.support.toy import QUICKSTART_MODEL

EXAMPLES = ROOT / "examples"
MODEL = f"model={QUICKSTART_MODEL}"
PHASES = [
    PhaseConfig(kind="zero_out", steps=10),
    PhaseConfig(kind="compress", steps=30),
    PhaseConfig(kind="solidify", steps=5),
]
NEURON = DMCConfig(decision_source="neuron", target_compression_ratio=4.0)


# What differs from another recipe; tests/experiments/test_compare.py has the whole ones.
CHANGES = {EXAMPLES / "compare" / "dms.yaml", EXAMPLES / "compare" / "gqa.yaml"}


@pytest.mark.parametrize(
    "path", sorted({*EXAMPLES.rglob("*.yaml")} - CHANGES), ids=lambda path: f"{path.parent.name}/{path.name}"
)
def test_examples_are_valid(path: Path) -> None:
    recipe = load_recipe(path, [] if "\nmodel:" in path.read_text() else [MODEL])
    assert recipe_from_dict(recipe.to_dict()) == recipe


def test_overrides_reach_lists_and_keep_their_types() -> None:
    path = EXAMPLES / "quickstart" / "recipe.yaml"
    recipe = load_recipe(path, [MODEL, "phases.1.steps=7", "dmc.window_size=12", "training.micro_batch_size=2"])
    assert recipe.phases[1].steps == 7
    assert recipe.dmc.window_size == 12
    assert recipe.training.micro_batch_size == 2


def test_damaged_recipes_are_refused(tmp_path: Path) -> None:
    path = tmp_path / "recipe.yaml"
    for content in ("model: [", "just text", "- a list", "\x00"):
        path.write_text(content)
        with pytest.raises(ConfigError, match="recipe"):
            load_recipe(path)
    with pytest.raises(ConfigError, match="does not exist"):
        load_recipe(tmp_path / "other.yaml")


def test_plan_of_every_phase() -> None:
    plans = [plan_step(PHASES, NEURON, step) for step in range(45)]
    assert [plan.phase_index for plan in plans] == [0] * 10 + [1] * 30 + [2] * 5
    scales = [plan.channel_scale for plan in plans[:10]]
    assert scales[0] == 1 and scales[4] == pytest.approx(0.5) and scales[8:] == [0, 0]
    targets = [plan.target_compression_ratio for plan in plans]
    assert targets[:10] == [None] * 10
    assert targets[10] == pytest.approx(1.1) and targets[24] == pytest.approx(2.5)
    assert targets[39:] == [4.0] * 6
    assert [plan.merging for plan in plans] == [False] * 10 + [True] * 35
    with pytest.raises(IndexError):
        plan_step(PHASES, NEURON, 45)


def test_integer_ratios_are_due_when_the_target_passes_them() -> None:
    assert integer_ratios(PHASES, NEURON) == {2: 20, 3: 30, 4: 40}
    later = [PhaseConfig(kind="compress", steps=10, start_compression_ratio=3.0)]
    assert integer_ratios(later, NEURON) == {4: 10}
    assert integer_ratios([PhaseConfig(kind="solidify", steps=10)], NEURON) == {}
    flat = [PhaseConfig(kind="compress", steps=10, start_compression_ratio=4.0)]
    assert integer_ratios(flat, NEURON) == {}


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"temperature": 0.0}, "temperature must be >= 1e-06, got 0"),
        ({"window_size": 0}, "window_size"),
        ({"window_size": "12"}, "window_size must be of type int"),
        ({"per_layer": "yes"}, "per_layer must be of type bool"),
        ({"decision_source": "channel"}, "decision_source must be one of neuron, projection"),
        ({"loss_coefficient": float("nan")}, "loss_coefficient must be a finite number"),
        ({"seed": -1}, "seed must be >= 0, got -1"),
    ],
)
def test_bad_dmc_settings_name_field_value_and_remedy(settings: dict[str, object], message: str) -> None:
    with pytest.raises(ConfigError, match=message):
        DMCConfig.from_dict(settings)
    with pytest.raises(ConfigError, match="unknown DMC setting compression"):
        DMCConfig.from_dict({"compression": 4})


@pytest.mark.parametrize(
    ("override", "message"),
    [
        ("data.train=[]", "data.train is empty"),
        ("data.seed=4294967296", r"data.seed must be <= 4294967295, got 4294967296"),
        ("monitor.log_interval=0", "monitor.log_interval must be >= 1, got 0"),
        ("monitor.heatmap_interval=-1", "monitor.heatmap_interval must be >= 0, got -1"),
        ("monitor.eval_samples=-1", "monitor.eval_samples must be >= 0, got -1"),
        ("data.train=data/text", r"data.train must be a list, got 'data/text'; write \[a, b\], for one \[a\]"),
        ("phases=compress", "phases must be a list, got 'compress'"),
        ("training=5", r"training must hold settings \(name: value\), got 5"),
        ("parallel=[2]", r"parallel must hold settings \(name: value\), got \[2\]"),
        ("data.cache=''", "data.cache is empty; name a folder"),
        ("checkpoint.directory=''", "checkpoint.directory is empty; name a folder"),
        ("training.global_batch_size=1000000000", "training.global_batch_size must be <= 1048576, got 1000000000"),
        ("monitor.eval_samples=2147483647", "monitor.eval_samples must be <= 1048576, got 2147483647"),
        ("training.micro_batch_size=4194303", "training.micro_batch_size must be <= 65536, got 4194303"),
        ("model.num_layers=2039", "numbers of stages that work: 1, 2039"),
    ],
)
def test_bad_settings_name_field_and_value(override: str, message: str) -> None:
    layout = ["parallel.pipeline_model_parallel_size=2"] if "layers" in override else []
    with pytest.raises(ConfigError, match=message) as caught:
        load_recipe(EXAMPLES / "quickstart" / "recipe.yaml", [MODEL, *layout, override])
    assert "\n" not in str(caught.value)


@pytest.mark.parametrize(
    ("overrides", "message"),
    [
        (["training.bf16=false"], "training.fp8 hybrid needs training.bf16 true"),
        (["training.transformer_impl=local"], "training.fp8 hybrid needs Transformer Engine; set .*transformer_impl"),
        (
            [
                *(
                    "training.train=full",
                    "distillation.weight=0",
                    "dmc.decision_source=neuron",
                    "dmc.ratio_control=loss",
                ),
                "phases.0.kind=compress",
            ],
            "training.fp8 hybrid needs dmc.decision_source projection",
        ),
        (["model.ffn_hidden_size=28736"], r"needs multiples of 16, model.ffn_hidden_size / .* is 3592;"),
        (
            ["parallel.sequence_parallel=false", "data.sequence_length=4090"],
            "needs multiples of 16, training.micro_batch_size x data.sequence_length / .* is 4090;",
        ),
        (["training.fp8=e5m2"], "training.fp8 must be one of e4m3, hybrid, or null, got 'e5m2'"),
    ],
)
def test_fp8_that_cannot_work_is_refused(overrides: list[str], message: str) -> None:
    path = EXAMPLES / "llama2_70b_dmc8" / "recipe.yaml"
    load_recipe(path, ["training.fp8=hybrid"])
    with pytest.raises(ConfigError, match=message):
        load_recipe(path, ["training.fp8=hybrid", *overrides])


@pytest.mark.parametrize(
    ("overrides", "message"),
    [
        (
            ["data.sequence_length=1026"],
            r"sequence_length \(1026\) must be divisible by 4 .* use 1024 or 1028, or another",
        ),
        (
            ["parallel.cp_comm_type=a2a", "parallel.context_parallel_size=4"],
            "a2a needs .* use a context_parallel_size of 1, 2",
        ),
        (["dmc.window_size=12"], r"window_size \(12\) must be null for parallel.context_parallel_size > 1"),
    ],
)
def test_context_parallel_layouts_that_cannot_work_are_refused(overrides: list[str], message: str) -> None:
    sizes = [MODEL, "model.num_query_groups=2", "model.max_position_embeddings=4096", "data.sequence_length=1024"]
    with pytest.raises(ConfigError, match=message):
        load_recipe(EXAMPLES / "quickstart" / "recipe.yaml", [*sizes, "parallel.context_parallel_size=2", *overrides])


def test_errors_name_commands_that_are_installed() -> None:
    """A script of tools/ is there only in a checkout."""
    named = [
        f"{path.name}: {text.value}"
        for path in sorted((ROOT / "megatron_dmc").rglob("*.py"))
        for error in ast.walk(ast.parse(path.read_text("utf-8")))
        if isinstance(error, ast.Raise)
        for text in ast.walk(error)
        if isinstance(text, ast.Constant) and isinstance(text.value, str) and "tools/" in text.value
    ]
    assert named == []
