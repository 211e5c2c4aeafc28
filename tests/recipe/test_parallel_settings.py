"""Layouts that cannot work are refused before a model is built, in one line with the sizes that would work."""

from pathlib import Path
from typing import Any

import pytest

from megatron_dmc.config import ConfigError
from megatron_dmc.distributed.world import world
from megatron_dmc.recipe import ParallelConfig, load_recipe
from megatron_dmc.training import step
from megatron_dmc.training.build import megatron_config
from megatron_dmc.training.trainer import Trainer
from tests.support.toy import recipe_values, write_recipe, write_text

TP, PP, VPP = (f"parallel.{name}_model_parallel_size" for name in ("tensor", "pipeline", "virtual_pipeline"))
SEQUENCE = "parallel.sequence_parallel=true"
PHASES = [{"kind": "compress", "steps": 2, "lr": 1e-3}]


def recipe(folder: Path) -> Path:
    values = recipe_values(folder, folder / "run", PHASES)
    values["model"] |= {"num_layers": 6, "hidden_size": 64, "num_attention_heads": 8, "num_query_groups": 4}
    values["model"]["ffn_hidden_size"] = 44
    values["data"]["sequence_length"] = 30
    return write_recipe(folder / "run", values)


@pytest.mark.parametrize(
    ("overrides", "message"),
    [
        ([f"{TP}=3"], r"tensor_model_parallel_size \(3\) must divide model.num_query_groups \(4\).* work: 1, 2, 4$"),
        ([f"{TP}=8"], r"\(8\) must divide model.num_query_groups \(4\): a KV head and its decisions live on one rank"),
        ([f"{TP}=4", "model.ffn_hidden_size=42"], r"must divide model.ffn_hidden_size \(42\); .* work: 1, 2$"),
        (
            [f"{TP}=4", "model.vocab_size=302"],
            r"vocab_size \(302\) .*\(4\); set it to 304 .*--pad-vocab-to-multiple-of 4.* work: 1, 2$",
        ),
        ([SEQUENCE], "sequence_parallel needs tensor_model_parallel_size > 1; set it to false"),
        (
            [f"{TP}=4", SEQUENCE],
            r"sequence_length \(30\) must be divisible by .*\(4\) under .*; use 28 or 32, or another",
        ),
        ([f"{PP}=4"], r"num_layers \(6\) must be divisible by the pipeline's 4 stages .* work: 1, 2, 3, 6$"),
        ([f"{PP}=2", f"{VPP}=2"], r"num_layers \(6\) .*'s 4 stages \(pipeline_model_parallel_size 2 x virtual.* 2\)"),
        ([f"{VPP}=2"], r"virtual_pipeline_model_parallel_size \(2\) needs pipeline_model_parallel_size > 1; set it to"),
        ([f"{PP}=2", f"{VPP}=1"], "virtual_pipeline_model_parallel_size must be >= 2, or null"),
    ],
    ids=lambda value: " ".join(value) if isinstance(value, list) else "",
)
def test_sizes_that_do_not_divide_are_refused(tmp_path: Path, overrides: list[str], message: str) -> None:
    with pytest.raises(ConfigError, match=message) as caught:
        load_recipe(recipe(tmp_path), overrides)
    assert "\n" not in str(caught.value)


@pytest.mark.parametrize(
    "overrides", [[f"{TP}=4"], [f"{TP}=2", SEQUENCE], [f"{PP}=3"], [f"{PP}=3", f"{VPP}=2"]], ids=" ".join
)
def test_sizes_that_divide_are_taken(tmp_path: Path, overrides: list[str]) -> None:
    load_recipe(recipe(tmp_path), overrides)


@pytest.mark.usefixtures("one_process")
def test_number_of_processes_is_a_multiple_of_the_layouts() -> None:
    message = r"tensor 2 x pipeline 3 x context 1 = 6 must divide the number of processes \(1\); start 6 or a multiple"
    layout = ParallelConfig(tensor_model_parallel_size=2, pipeline_model_parallel_size=3)
    with pytest.raises(ConfigError, match=message), world(layout):
        pass


@pytest.mark.usefixtures("one_process")
@pytest.mark.parametrize(
    ("overrides", "message"),
    [
        (["training.global_batch_size=5"], r"\(5\) must be a multiple of .* \(2\) x .* \(1\); sizes .* work: 4, 6$"),
        (["training.global_batch_size=1"], "sizes near it that work: 2$"),
        (
            [f"{PP}=3", f"{VPP}=2", "training.global_batch_size=8"],
            r"\(8\) must be a multiple of .* x interleaved pipeline stages \(3\); sizes .* work: 6, 12$",
        ),
    ],
    ids=lambda value: " ".join(value) if isinstance(value, list) else "",
)
def test_batch_that_does_not_fit_is_refused_before_the_model_is_built(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, overrides: list[str], message: str
) -> None:
    write_text(tmp_path)

    def build(*_: Any) -> None:
        raise AssertionError("a model was built")

    monkeypatch.setattr(step, "build_chunks", build)
    with pytest.raises(ConfigError, match=message) as caught:
        Trainer(load_recipe(recipe(tmp_path), overrides))
    assert "\n" not in str(caught.value)


@pytest.mark.usefixtures("one_process")
@pytest.mark.parametrize(
    ("override", "message"),
    [
        (
            "training.transformer_impl=transformer_engine",
            "transformer_engine, which is not installed; pip install",
        ),
        (
            "training.fp8=hybrid",
            "training.fp8 is hybrid, but Transformer Engine is not installed; set training.fp8 to null",
        ),
    ],
    ids=["Transformer Engine", "FP8"],
)
def test_what_this_machine_lacks_is_named_before_the_model_is_built(
    tmp_path: Path, override: str, message: str
) -> None:
    sizes = ["training.bf16=true", "model.ffn_hidden_size=64", "model.hidden_size=128", "data.sequence_length=32"]
    with pytest.raises(ConfigError, match=message) as caught:
        Trainer(load_recipe(recipe(tmp_path), [*sizes, override]))
    assert "\n" not in str(caught.value)


def test_fp8_is_handed_to_megatron_core(tmp_path: Path) -> None:
    sizes = ["training.bf16=true", "model.ffn_hidden_size=64", "model.hidden_size=128", "data.sequence_length=32"]
    config = megatron_config(load_recipe(recipe(tmp_path), [*sizes, "training.fp8=hybrid"]))
    # Current scaling: no history that a teacher's pass or a resumed run would have to share.
    assert (config.fp8, config.fp8_recipe) == ("hybrid", "tensorwise")
    assert megatron_config(load_recipe(recipe(tmp_path))).fp8 is None
