"""Tiny random models whose decisions merge about half of the tokens, with logits far from 0."""

from collections.abc import Callable
from typing import Any

import pytest
import torch
from transformers import LlamaConfig, LlamaForCausalLM

from megatron_dmc.hf.configuration_dmc import DMCLlamaConfig
from megatron_dmc.hf.modeling_dmc import DMCLlamaForCausalLM

torch.set_num_threads(1)

SIZES: dict[str, Any] = {
    "vocab_size": 97,
    "hidden_size": 64,
    "intermediate_size": 96,
    "num_hidden_layers": 3,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "max_position_embeddings": 256,
    "initializer_range": 0.2,  # logits that differ: greedy choices are not ties
    "pad_token_id": 0,
    "bos_token_id": 1,
    "eos_token_id": None,
}
VARIANTS: dict[str, dict[str, Any]] = {
    "projection": {"decision_source": "projection"},
    "neuron": {"decision_source": "neuron"},
    "per-layer": {"decision_source": "projection", "per_layer": True},
    "window-12": {"decision_source": "projection", "window_size": 12},
    "neuron-window-3": {"decision_source": "neuron", "window_size": 3},
}


@pytest.fixture(scope="session")
def base_model() -> LlamaForCausalLM:
    torch.manual_seed(0)
    return LlamaForCausalLM(LlamaConfig(**SIZES)).eval()


@pytest.fixture(scope="session")
def make_model() -> Callable[..., DMCLlamaForCausalLM]:
    def make(dmc: dict[str, Any], **config: Any) -> DMCLlamaForCausalLM:
        torch.manual_seed(1)
        model = DMCLlamaForCausalLM(DMCLlamaConfig(dmc=dmc, **{**SIZES, **config})).eval()
        with torch.no_grad():
            for layer in model.model.layers:
                attention = layer.self_attn
                if dmc.get("decision_source") == "neuron":
                    attention.k_proj.weight.view(-1, attention.head_dim, SIZES["hidden_size"])[:, -1] *= 100
                else:
                    attention.decision.weight.normal_(std=20.0)
                    attention.decision.bias.normal_()
        return model

    return make


@pytest.fixture(scope="session", params=VARIANTS.values(), ids=VARIANTS)
def model(request: pytest.FixtureRequest, make_model: Callable[..., DMCLlamaForCausalLM]) -> DMCLlamaForCausalLM:
    return make_model(request.param)


@pytest.fixture(scope="session")
def projection_model(make_model: Callable[..., DMCLlamaForCausalLM]) -> DMCLlamaForCausalLM:
    return make_model(VARIANTS["projection"])


@pytest.fixture
def prompt() -> torch.Tensor:
    return torch.randint(3, SIZES["vocab_size"], (3, 41), generator=torch.Generator().manual_seed(2))


@pytest.fixture
def left_padded(prompt: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    """Prompts of 41, 30 and 2 tokens."""
    mask = torch.ones_like(prompt)
    mask[1, :11] = mask[2, :39] = 0
    return prompt * mask, mask
