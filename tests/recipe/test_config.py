"""What the rest of the package asks a DMCConfig."""

import inspect

import pytest

from megatron_dmc.config import DMCConfig
from megatron_dmc.ops.decode import LayerCache


@pytest.mark.parametrize("source", ["neuron", "projection"])
def test_a_source_is_the_channel_or_a_projection(source: str) -> None:
    config = DMCConfig(decision_source=source)  # type: ignore[arg-type]
    assert (config.uses_key_channel, config.has_projection) == (source == "neuron", source == "projection")
    assert config.cache_settings()["clears_last_channel"] == (source == "neuron")


def test_the_cache_takes_its_settings() -> None:
    config = DMCConfig(local_window=16, operation="evict")
    assert config.evicts and not DMCConfig().evicts
    inspect.signature(LayerCache).bind(**config.cache_settings())
    assert config.cache_settings() == {
        "local_window": 16,
        "operation": "evict",
        "window_size": None,
        "clears_last_channel": False,
    }
