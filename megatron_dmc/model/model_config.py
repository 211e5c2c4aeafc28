"""Sizes of the Llama-like decoder, whole-model numbers under megatron-core's names."""

from dataclasses import dataclass
from typing import Any

from megatron_dmc.config import ConfigError

# OmegaConf's marker of a value that must be given. This module also serves where OmegaConf is not installed.
MISSING: Any = "???"


@dataclass(frozen=True)
class ModelConfig:
    """A decoder with RMSNorm, SwiGLU, rotary embedding and grouped-query attention, without biases.

    A recipe with ``checkpoint.load_base`` takes from the base what it does not give itself.
    """

    num_layers: int = MISSING  # decoder layers
    hidden_size: int = MISSING  # channels of the residual stream
    ffn_hidden_size: int = MISSING  # channels inside the SwiGLU
    num_attention_heads: int = MISSING  # query heads
    num_query_groups: int = MISSING  # KV heads
    vocab_size: int = MISSING  # tokens; rows of the embedding
    max_position_embeddings: int = MISSING  # tokens, the longest sequence
    kv_channels: int | None = None  # head dimension; null: hidden_size / num_attention_heads
    rotary_base: float = 10000.0  # theta of the rotary embedding
    rotary_scaling_factor: float | None = None  # Llama 3's frequency scaling (8.0 in 3.1, 32.0 in 3.2); null: plain
    norm_epsilon: float = 1e-5  # of RMSNorm
    init_method_std: float = 0.02  # standard deviation of weights that no checkpoint brings
    share_embeddings_and_output_weights: bool = False  # the output layer is the embedding

    @property
    def head_dim(self) -> int:
        return self.kv_channels or self.hidden_size // self.num_attention_heads

    def check(self) -> None:
        """Raises ConfigError for sizes that do not fit together. (Reading a recipe finds missing values.)"""
        for name, value in vars(self).items():
            if value is not None and not isinstance(value, bool) and value <= 0:
                raise ConfigError(f"model.{name} must be > 0, got {value}")
        if self.kv_channels is None and self.hidden_size % self.num_attention_heads:
            raise ConfigError(
                f"model.hidden_size ({self.hidden_size}) must be divisible by model.num_attention_heads "
                f"({self.num_attention_heads}), or set model.kv_channels"
            )
        if self.num_attention_heads % self.num_query_groups:
            raise ConfigError(
                f"model.num_attention_heads ({self.num_attention_heads}) must be divisible by model.num_query_groups "
                f"({self.num_query_groups})"
            )
        if self.head_dim % 2:
            raise ConfigError(f"the head dimension must be even for rotary embedding, got {self.head_dim}")
