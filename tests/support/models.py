"""Tiny random megatron-core models whose decisions are mixed and keep a margin from 0."""

from dataclasses import replace
from typing import Any

import torch
from megatron.core.models.gpt import GPTModel

from megatron_dmc.config import DMCConfig
from megatron_dmc.model.gpt import build_model, dmc_layers, transformer_config
from megatron_dmc.model.model_config import ModelConfig

SIZES = ModelConfig(
    num_layers=3,
    hidden_size=48,
    ffn_hidden_size=64,
    num_attention_heads=6,
    num_query_groups=2,
    vocab_size=97,
    max_position_embeddings=256,
    init_method_std=0.2,
)


# Of each family; heads are wider than hidden_size / num_attention_heads where the family's may be.
FAMILY_SIZES = {
    "llama": SIZES,
    "mistral": replace(SIZES, family="mistral", kv_channels=16),
    "qwen2": replace(SIZES, family="qwen2"),
    "qwen3": replace(SIZES, family="qwen3", kv_channels=16),
}


def random_model(dmc: DMCConfig | None, seed: int = 0, sizes: ModelConfig = SIZES, **config: Any) -> GPTModel:
    """About half of its tokens merge; norms of heads and biases are random, too. In eval mode."""
    torch.manual_seed(seed)
    model = build_model(sizes, dmc, transformer_config(sizes, **config)).eval()
    generator = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for layer in dmc_layers(model):
            if sizes.add_qkv_bias:
                layer.linear_qkv.bias.normal_(std=0.5, generator=generator)
            if sizes.qk_layernorm:
                for norm in (layer.q_layernorm, layer.k_layernorm):
                    norm.weight.uniform_(0.5, 1.5, generator=generator)
        for layer in dmc_layers(model) if dmc is not None else ():
            if dmc.decision_source == "projection":
                for parameter in layer.decision.parameters():
                    parameter.normal_(std=3.0, generator=generator)
            else:
                rows = layer.linear_qkv.weight.view(sizes.num_query_groups, -1, sizes.head_dim, sizes.hidden_size)
                rows[:, :-1, -1].normal_(std=3.0, generator=generator)
    return model


def tokens(batch: int, seq: int, seed: int = 0) -> torch.Tensor:
    return torch.randint(SIZES.vocab_size, (batch, seq), generator=torch.Generator().manual_seed(seed))


def positions(ids: torch.Tensor) -> torch.Tensor:
    return torch.arange(ids.shape[1]).expand_as(ids)
