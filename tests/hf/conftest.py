"""Tiny random models whose decisions merge about half of the tokens, with logits far from 0."""

from collections.abc import Callable
from typing import Any

import pytest
import torch
from transformers import LlamaForCausalLM

from megatron_dmc.hf.families.llama import DMCLlamaForCausalLM
from tests.support.exports import VOCABULARY, dmc_model, plain_model

torch.set_num_threads(1)

VARIANTS: dict[str, dict[str, Any]] = {
    "projection": {"decision_source": "projection"},
    "neuron": {"decision_source": "neuron"},
    "per-layer": {"decision_source": "projection", "per_layer": True},
    "window-12": {"decision_source": "projection", "window_size": 12},
    "neuron-window-3": {"decision_source": "neuron", "window_size": 3},
}


@pytest.fixture(scope="session")
def base_model() -> LlamaForCausalLM:
    return plain_model()


@pytest.fixture(scope="session")
def make_model() -> Callable[..., DMCLlamaForCausalLM]:
    return dmc_model


@pytest.fixture(scope="session", params=VARIANTS.values(), ids=VARIANTS)
def model(request: pytest.FixtureRequest, make_model: Callable[..., DMCLlamaForCausalLM]) -> DMCLlamaForCausalLM:
    return make_model(request.param)


@pytest.fixture(scope="session")
def projection_model(make_model: Callable[..., DMCLlamaForCausalLM]) -> DMCLlamaForCausalLM:
    return make_model(VARIANTS["projection"])


@pytest.fixture
def prompt() -> torch.Tensor:
    return torch.randint(3, VOCABULARY, (3, 41), generator=torch.Generator().manual_seed(2))


@pytest.fixture
def left_padded(prompt: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    """Prompts of 41, 30 and 2 tokens."""
    mask = torch.ones_like(prompt)
    mask[1, :11] = mask[2, :39] = 0
    return prompt * mask, mask
