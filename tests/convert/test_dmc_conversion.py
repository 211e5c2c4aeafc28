"""A retrofitted model there and back: the exported model computes the same, and its settings are kept."""

import json
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from megatron.core.models.gpt import GPTModel
from torch import Tensor
from transformers import AutoModelForCausalLM
from transformers.dynamic_module_utils import get_class_from_dynamic_module

from megatron_dmc.checkpoint import CheckpointInfo, SavedModel, save_checkpoint
from megatron_dmc.checkpoint.weights import model_state
from megatron_dmc.config import ConfigError, DMCConfig
from megatron_dmc.convert.from_hf import import_hf
from megatron_dmc.convert.hf_config import read_config
from megatron_dmc.convert.single_process import empty_model
from megatron_dmc.convert.to_checkpoint import placeholder_recipe
from megatron_dmc.convert.to_hf import export_hf
from megatron_dmc.model.gpt import dmc_layers
from tests.support.llamas import TOKENS, load_megatron, megatron_logits
from tests.support.tensors import assert_same_tensors, hugging_face_tensors


def logit_margin(network: GPTModel) -> tuple[float, float]:
    """Smallest distance of a merge logit from 0, and the share of tokens that merge, over all layers."""
    logits: list[Tensor] = []
    layers = dmc_layers(network)
    for layer in layers:
        original = layer.decision_logits

        def record(*args: Any, original: Any = original) -> tuple[Tensor, Tensor]:
            a, b = original(*args)
            logits.append(a)
            return a, b

        layer.decision_logits = record  # type: ignore[method-assign]
    megatron_logits(network)
    for layer in layers:
        del layer.decision_logits
    a = torch.stack(logits)
    return a.abs().min().item(), (a > 0).float().mean().item()


@pytest.fixture
def dmc_checkpoint(
    request: pytest.FixtureRequest, save_llama: Callable[..., Path], tokenizer_folder: Path, tmp_path: Path
) -> Iterator[Path]:
    """A random model that merges about half of its tokens, saved as a run's last weights."""
    dmc: DMCConfig = request.param
    folder = save_llama(seed=3)
    import_hf(folder, tmp_path / "base")
    base = load_megatron(tmp_path / "base")
    model, _ = read_config(folder)
    network = empty_model(model, dmc, torch.float32).eval()
    torch.manual_seed(5)
    with torch.no_grad():
        for name, parameter in network.named_parameters():
            if ".decision." in name:
                parameter.normal_(std=1.0)
            else:
                parameter.copy_(base.get_parameter(name))
    recipe = placeholder_recipe(model, dmc)
    info = CheckpointInfo("weights", recipe.to_dict(), 1, 1, 0, 2.0)
    save_checkpoint(tmp_path / "run", "final", model_state([network]), info, tokenizer_folder)
    yield tmp_path / "run" / "final"


DMC = {
    "projection": DMCConfig(decision_source="projection", decision_bias=0.5),
    "projection-scaled": DMCConfig(decision_source="projection", decision_bias=0.5, decision_scale=3.0),
    "projection-window": DMCConfig(decision_source="projection", decision_bias=0.5, window_size=3),
    "projection-per-layer": DMCConfig(decision_source="projection", decision_bias=0.5, per_layer=True),
    "neuron": DMCConfig(decision_source="neuron", decision_bias=0.3),
    "neuron-local-window": DMCConfig(decision_source="neuron", decision_bias=0.3, local_window=4),
    "projection-local-window": DMCConfig(decision_source="projection", decision_bias=0.5, local_window=4),
    "projection-evict": DMCConfig(decision_source="projection", decision_bias=0.5, local_window=4, operation="evict"),
    "projection-absorb": DMCConfig(decision_source="projection", decision_bias=0.5, local_window=4, operation="absorb"),
    "neuron-absorb": DMCConfig(decision_source="neuron", decision_bias=0.3, local_window=4, operation="absorb"),
}


@pytest.mark.parametrize("dmc_checkpoint", DMC.values(), ids=DMC, indirect=True)
def test_an_exported_dmc_model_computes_the_same(dmc_checkpoint: Path, tmp_path: Path) -> None:
    network = load_megatron(dmc_checkpoint)
    margin, merged = logit_margin(network)
    # The margin is enough for rounding, and both decisions occur.
    assert margin > 1e-4 and 0.1 < merged < 0.9
    export_hf(dmc_checkpoint, tmp_path / "hf")
    # Not by AutoModelForCausalLM: another test may have made our own classes known to it.
    name = json.loads((tmp_path / "hf" / "config.json").read_text())["auto_map"]["AutoModelForCausalLM"]
    exported = get_class_from_dynamic_module(name, str(tmp_path / "hf")).from_pretrained(tmp_path / "hf").eval()
    assert type(exported).__name__ == "DMCLlamaForCausalLM"
    assert type(exported).__module__.startswith("transformers_modules.")
    logits = exported(TOKENS).logits
    torch.testing.assert_close(logits, megatron_logits(network), rtol=0, atol=1e-5)
    for layer in dmc_layers(network):
        layer.step = type(layer.step)(merging=False)
    assert (logits - megatron_logits(network)).abs().max() > 1e-2


THERE_AND_BACK = ("projection", "neuron", "neuron-local-window", "projection-evict", "projection-absorb")


@pytest.mark.parametrize("dmc_checkpoint", [DMC[name] for name in THERE_AND_BACK], ids=THERE_AND_BACK, indirect=True)
def test_a_dmc_model_there_and_back(dmc_checkpoint: Path, tmp_path: Path) -> None:
    export_hf(dmc_checkpoint, tmp_path / "hf")
    import_hf(tmp_path / "hf", tmp_path / "again")
    first, second = (load_megatron(path) for path in (dmc_checkpoint, tmp_path / "again"))
    assert_same_tensors(dict(first.named_parameters()), dict(second.named_parameters()))
    before, after = (SavedModel.open(path).recipe for path in (dmc_checkpoint, tmp_path / "again"))
    assert (after.model, after.dmc, after.merges) == (before.model, before.dmc, True)
    names = set(hugging_face_tensors(tmp_path / "hf"))
    has_decisions = before.dmc.decision_source == "projection"
    assert ("model.layers.0.self_attn.decision.weight" in names) == has_decisions
    assert json.loads((tmp_path / "hf" / "generation_config.json").read_text())["eos_token_id"] == 0


@pytest.mark.parametrize("dmc_checkpoint", [DMC["projection"]], ids=["projection"], indirect=True)
def test_an_export_from_before_there_was_a_window(dmc_checkpoint: Path, tmp_path: Path) -> None:
    """config.json without the newer keys means what it meant: merge at once."""
    export_hf(dmc_checkpoint, tmp_path / "hf")
    expected = AutoModelForCausalLM.from_pretrained(tmp_path / "hf", trust_remote_code=True)(TOKENS).logits
    path = tmp_path / "hf" / "config.json"
    config = json.loads(path.read_text())
    assert (config["dmc"].pop("local_window"), config["dmc"].pop("operation")) == (0, "merge")
    path.write_text(json.dumps(config))
    old = AutoModelForCausalLM.from_pretrained(tmp_path / "hf", trust_remote_code=True)
    assert torch.equal(old(TOKENS).logits, expected)
    import_hf(tmp_path / "hf", tmp_path / "again")
    dmc = SavedModel.open(tmp_path / "again").recipe.dmc
    assert (dmc.local_window, dmc.operation) == (0, "merge")


@pytest.mark.parametrize("dmc_checkpoint", [DMCConfig(omega_floor=2**-7)], ids=["projection"], indirect=True)
def test_an_export_from_before_omega_had_a_floor_of_its_own(dmc_checkpoint: Path, tmp_path: Path) -> None:
    export_hf(dmc_checkpoint, tmp_path / "hf")
    path = tmp_path / "hf" / "config.json"
    config = json.loads(path.read_text())
    assert config["dmc"].pop("omega_floor") == 2**-7
    path.write_text(json.dumps(config))
    old = AutoModelForCausalLM.from_pretrained(tmp_path / "hf", trust_remote_code=True)
    assert old.config.dmc["omega_floor"] == 2**-7
    import_hf(tmp_path / "hf", tmp_path / "again")
    assert SavedModel.open(tmp_path / "again").recipe.dmc.omega_floor == 2**-7


@pytest.mark.parametrize("dmc_checkpoint", [DMC["neuron"]], ids=["neuron"], indirect=True)
def test_a_retrofit_that_has_not_begun_to_merge(dmc_checkpoint: Path, tmp_path: Path) -> None:
    """In zero_out the channel still belongs to the base's attention: read as decisions it is noise."""
    path = dmc_checkpoint / "dmc.json"
    content = json.loads(path.read_text())
    compress = content["recipe"]["phases"][0]
    content["recipe"]["phases"] = [compress | {"kind": "zero_out"}, compress]
    path.write_text(json.dumps(content))
    with pytest.raises(ConfigError, match="was saved before its run began to merge; name a later checkpoint"):
        export_hf(dmc_checkpoint, tmp_path / "hf")
    path.write_text(json.dumps(content | {"phase": 1}))
    export_hf(dmc_checkpoint, tmp_path / "hf")
