"""Models that would fail later are refused at conversion and with the recipe; settings that agree are not."""

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from torch._subclasses.fake_tensor import FakeTensor, FakeTensorMode

from megatron_dmc.checkpoint import CheckpointError, SavedModel
from megatron_dmc.checkpoint.weights import model_state
from megatron_dmc.config import ConfigError, DMCConfig
from megatron_dmc.convert.from_hf import import_hf
from megatron_dmc.convert.single_process import empty_model
from megatron_dmc.convert.to_checkpoint import placeholder_recipe
from megatron_dmc.hf.adapter import _check_config
from megatron_dmc.hf.families.llama import DMCLlamaConfig
from megatron_dmc.model.model_config import ModelConfig
from megatron_dmc.ops.attention.flash import flash_forward
from megatron_dmc.ops.attention.types import BiasedKeys, KernelSettings
from megatron_dmc.recipe import check_recipe, recipe_from_dict

NEURON, PROJECTION = DMCConfig(decision_source="neuron"), DMCConfig(decision_source="projection")
ROUNDED = 9.999999747378752e-06  # 1e-5 in float32


def model(head_dim: int) -> ModelConfig:
    return ModelConfig(2, 32, 48, 4, 2, 300, 128, kv_channels=head_dim)


@pytest.mark.parametrize(
    ("dmc", "widest"), [(None, 256), (NEURON, 256), (PROJECTION, 248)], ids=["base", "neuron", "proj"]
)
def test_head_dimensions_of_a_recipe(dmc: DMCConfig | None, widest: int) -> None:
    for head_dim in (8, 40, 128, 248, widest):
        check_recipe(placeholder_recipe(model(head_dim), dmc))
    for head_dim in (2, 12, 100, widest + 8, 512):
        with pytest.raises(
            ConfigError, match=f"must be a multiple of 8 and <= {widest}.* got {head_dim}: flash-attention"
        ):
            check_recipe(placeholder_recipe(model(head_dim), dmc))


@pytest.mark.parametrize("head_dim", [4, 20, 264])
def test_head_dimensions_of_a_folder(save_llama: Callable[..., Path], tmp_path: Path, head_dim: int) -> None:
    folder = save_llama(head_dim=head_dim)
    with pytest.raises(ConfigError, match=f"must be a multiple of 8 and <= 256, got {head_dim}"):
        import_hf(folder, tmp_path / "megatron")
    assert not list(tmp_path.iterdir())


def test_float32_on_a_gpu_names_the_remedy() -> None:
    """What an exported float32 model runs into there. Fake tensors have devices that are not there."""
    with FakeTensorMode() as mode:
        query = FakeTensor(mode, torch.empty(1, 8, 2, 8, device="meta"), torch.device("cuda:0"))
        with pytest.raises(TypeError, match=r"got torch.float32: load the model with dtype=torch.bfloat16") as error:
            flash_forward(query, BiasedKeys(query, query, None), KernelSettings(1.0))
        assert "\n" not in str(error.value)


def recipe_with(checkpoint: Path, **settings: Any) -> dict[str, Any]:
    values = SavedModel.open(checkpoint).info.recipe
    values["model"] |= settings
    return values


def test_a_number_in_float32s_digits_is_the_same(save_llama: Callable[..., Path], tmp_path: Path) -> None:
    import_hf(save_llama(rms_norm_eps=ROUNDED), tmp_path / "megatron")
    assert SavedModel.open(tmp_path / "megatron").info.recipe["model"]["norm_epsilon"] == ROUNDED
    values = recipe_with(tmp_path / "megatron", norm_epsilon=1e-5)
    state = model_state([empty_model(recipe_from_dict(values).model, None, torch.float32)])
    SavedModel.open(tmp_path / "megatron").load(state, expected_model=values["model"])
    for epsilon in (1.0001e-5, 1e-6):
        values = recipe_with(tmp_path / "megatron", norm_epsilon=epsilon)
        with pytest.raises(CheckpointError, match=f"model.norm_epsilon is {ROUNDED} there, {epsilon} here"):
            SavedModel.open(tmp_path / "megatron").load(state, expected_model=values["model"])


def test_an_adapters_base_in_float32s_digits_is_the_same(save_llama: Callable[..., Path]) -> None:
    folder = save_llama(rms_norm_eps=ROUNDED)
    values = json.loads((folder / "config.json").read_text())
    mine = {name: value for name, value in values.items() if name not in ("model_type", "architectures")}
    _check_config("base", "adapter", values, DMCLlamaConfig(**mine | {"rms_norm_eps": 1e-5}))
    with pytest.raises(ValueError, match="its rms_norm_eps is"):
        _check_config("base", "adapter", values, DMCLlamaConfig(**mine | {"rms_norm_eps": 1.001e-5}))
