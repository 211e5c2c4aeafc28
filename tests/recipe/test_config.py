"""What the rest of the package asks a DMCConfig."""

import inspect
from pathlib import Path

import pytest
import yaml

from megatron_dmc.config import DMCConfig
from megatron_dmc.ops.decode import LayerCache
from megatron_dmc.recipe import load_recipe, recipe_from_dict
from tests.support.processes import ROOT
from tests.support.toy import recipe_values, write_recipe


@pytest.mark.parametrize("source", ["neuron", "projection"])
def test_a_source_is_the_channel_or_a_projection(source: str) -> None:
    config = DMCConfig(decision_source=source)  # type: ignore[arg-type]
    assert (config.uses_key_channel, config.has_projection) == (source == "neuron", source == "projection")
    assert config.cache_settings()["clears_last_channel"] == (source == "neuron")


def test_the_cache_takes_its_settings() -> None:
    config = DMCConfig(local_window=16, operation="evict")
    assert (config.merges, config.absorbs) == (False, False)
    assert (DMCConfig().merges, DMCConfig().absorbs) == (True, False)
    inspect.signature(LayerCache).bind(**config.cache_settings())
    assert config.cache_settings() == {
        "local_window": 16,
        "operation": "evict",
        "window_size": None,
        "clears_last_channel": False,
    }


def test_omega_has_no_bias_where_tokens_are_absorbed() -> None:
    absorbing = DMCConfig(local_window=16, operation="absorb", decision_bias=3.0)
    assert absorbing.absorbs and not absorbing.merges
    assert (absorbing.omega_bias, DMCConfig(decision_bias=3.0).omega_bias) == (0.0, 3.0)


def test_what_was_saved_before_omega_had_a_floor_of_its_own(tmp_path: Path) -> None:
    """Checkpoints and exports had 2^-7 then; a person's recipe has today's default."""
    default, earlier = DMCConfig().omega_floor, 2**-7
    assert default == 2**-24
    saved = DMCConfig(seed=7).to_dict()
    del saved["omega_floor"]
    assert DMCConfig.from_dict(saved) == DMCConfig(seed=7, omega_floor=earlier)
    assert DMCConfig.from_dict({}) == DMCConfig()
    assert DMCConfig.from_dict(DMCConfig().to_dict()).omega_floor == default

    values = recipe_values(tmp_path, tmp_path, [{"kind": "compress", "steps": 1}])
    assert load_recipe(write_recipe(tmp_path, values)).dmc.omega_floor == default
    assert recipe_from_dict(values).dmc.omega_floor == earlier
    assert recipe_from_dict({**values, "dmc": {}}).dmc.omega_floor == default
    whole = load_recipe(write_recipe(tmp_path, values))
    assert recipe_from_dict(whole.to_dict()) == whole


@pytest.mark.parametrize(
    "name", ["quickstart/recipe", "quickstart/adapter", "quickstart/neuron", "llama2_7b_dmc8/paper"]
)
def test_recipes_whose_numbers_are_published_keep_the_floor_of_then(name: str) -> None:
    recipe = yaml.safe_load((ROOT / "examples" / f"{name}.yaml").read_text("utf-8"))
    assert recipe["dmc"]["omega_floor"] == 2**-7
