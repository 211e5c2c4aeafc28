"""Tiny random megatron-core models whose decisions are mixed and keep a margin from 0."""

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


def random_model(dmc: DMCConfig | None, seed: int = 0, **config: Any) -> GPTModel:
    """About half of its tokens merge. In eval mode."""
    torch.manual_seed(seed)
    model = build_model(SIZES, dmc, transformer_config(SIZES, **config)).eval()
    generator = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for layer in dmc_layers(model) if dmc is not None else ():
            if dmc.decision_source == "projection":
                for parameter in layer.decision.parameters():
                    parameter.normal_(std=3.0, generator=generator)
            else:
                rows = layer.linear_qkv.weight.view(SIZES.num_query_groups, -1, SIZES.head_dim, SIZES.hidden_size)
                rows[:, :-1, -1].normal_(std=3.0, generator=generator)
    return model


def tokens(batch: int, seq: int, seed: int = 0) -> torch.Tensor:
    return torch.randint(SIZES.vocab_size, (batch, seq), generator=torch.Generator().manual_seed(seed))


def positions(ids: torch.Tensor) -> torch.Tensor:
    return torch.arange(ids.shape[1]).expand_as(ids)
