"""Tiny random models as Hugging Face runs them, with logits far from 0; about half of what can merge does."""

from typing import Any

import torch
from transformers import LlamaConfig, LlamaForCausalLM

from megatron_dmc.hf.configuration_dmc import DMCLlamaConfig
from megatron_dmc.hf.modeling_dmc import DMCLlamaForCausalLM

VOCABULARY = 97
_SIZES: dict[str, Any] = {
    "vocab_size": VOCABULARY,
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


def plain_model() -> LlamaForCausalLM:
    torch.manual_seed(0)
    return LlamaForCausalLM(LlamaConfig(**_SIZES)).eval()


def dmc_model(dmc: dict[str, Any], **config: Any) -> DMCLlamaForCausalLM:
    """``dmc`` are the export's settings, ``config`` other values of its configuration."""
    torch.manual_seed(1)
    model = DMCLlamaForCausalLM(DMCLlamaConfig(dmc=dmc, **{**_SIZES, **config})).eval()
    with torch.no_grad():
        for layer in model.model.layers:
            attention = layer.self_attn
            if dmc.get("decision_source") == "neuron":
                attention.k_proj.weight.view(-1, attention.head_dim, _SIZES["hidden_size"])[:, -1] *= 100
            else:
                attention.decision.weight.normal_(std=20.0)
                attention.decision.bias.normal_()
    return model
