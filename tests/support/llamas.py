"""Random tiny models as Hugging Face saves them, and what is computed with a model on either side of a conversion."""

from pathlib import Path
from typing import Any

import torch
import transformers
from megatron.core.models.gpt import GPTModel
from torch import Tensor

from megatron_dmc.checkpoint import SavedModel
from megatron_dmc.convert.families import FAMILIES
from megatron_dmc.convert.single_process import empty_model

TOKENS = torch.arange(2 * 37).mul(7).remainder(300).reshape(2, 37)

# SmolLM2's sizes; without a base a recipe must name its model.
SMOLLM2 = [
    *("model.num_layers=30", "model.hidden_size=576", "model.ffn_hidden_size=1536", "model.num_attention_heads=9"),
    *("model.num_query_groups=3", "model.vocab_size=49152", "model.max_position_embeddings=8192"),
]


# What the smallest models of a family need to have what is the family's own.
_OF_FAMILY: dict[str, dict[str, Any]] = {
    "llama": {},
    "mistral": {"sliding_window": None},
    "qwen2": {},
    "qwen3": {"head_dim": 16},  # twice hidden_size / num_attention_heads
}


def save_random_base(
    folder: Path, seed: int = 0, max_shard_size: str = "5GB", family: Any = "llama", **overrides: Any
) -> None:
    """Saves the model, without a tokenizer; ``overrides`` are its configuration's. Norms and biases are random, too."""
    settings: dict[str, Any] = {
        "vocab_size": 300,
        "hidden_size": 32,
        "intermediate_size": 48,
        "num_hidden_layers": 2,
        "num_attention_heads": 4,
        "num_key_value_heads": 2,
        "max_position_embeddings": 128,
        "rms_norm_eps": 1e-5,
        "initializer_range": 0.2,
        "dtype": torch.float32,
    }
    torch.manual_seed(seed)
    kind = getattr(transformers, FAMILIES[family].architecture)
    config = kind.config_class(**(settings | _OF_FAMILY[family] | overrides))
    model = kind(config).to(config.dtype)
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if "norm" in name:
                parameter.uniform_(0.5, 1.5)
            elif name.endswith("bias"):
                parameter.normal_(std=0.3)
    model.save_pretrained(folder, max_shard_size=max_shard_size)


def load_megatron(checkpoint: Path, dtype: torch.dtype = torch.float32) -> GPTModel:
    """The model of a checkpoint, on one process."""
    saved = SavedModel.open(checkpoint)
    network = empty_model(saved.recipe.model, saved.dmc, dtype)
    saved.load_into([network])
    return network.eval()


@torch.no_grad()
def megatron_logits(network: GPTModel) -> Tensor:
    positions = torch.arange(TOKENS.shape[1]).expand_as(TOKENS)
    return network(TOKENS, positions, None)
