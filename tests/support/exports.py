"""Tiny random models as Hugging Face runs them, with logits far from 0; about half of what can merge does."""

from typing import Any

import torch
from transformers import LlamaConfig, LlamaForCausalLM

from megatron_dmc.hf.families import dmc_classes

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


def dmc_model(dmc: dict[str, Any], family: str = "llama", **config: Any) -> Any:
    """``dmc`` are the export's settings, ``config`` other values of its configuration. Norms and biases are random too."""
    torch.manual_seed(1)
    config_class, model_class = dmc_classes(family)
    if family == "mistral":
        config = {"sliding_window": None, **config}
    model = model_class(config_class(dmc=dmc, **{**_SIZES, "head_dim": 16, **config})).eval()
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if family != "llama" and parameter.dim() == 1:
                parameter.uniform_(0.5, 1.5) if "norm" in name else parameter.normal_(std=0.3)
        for layer in model.model.layers:
            attention = layer.self_attn
            if dmc.get("decision_source") == "neuron":
                attention.k_proj.weight.view(-1, attention.head_dim, _SIZES["hidden_size"])[:, -1] *= 100
            else:
                attention.decision.weight.normal_(std=20.0)
                attention.decision.bias.normal_()
    return model
