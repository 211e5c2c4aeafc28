"""Family and sizes of the decoder, whole-model numbers under megatron-core's names."""

from dataclasses import dataclass
from typing import Annotated, Any, Literal, NamedTuple

from megatron_dmc.config import ConfigError, Count, Range, check_ranges

# OmegaConf's marker of a value that must be given. This module also serves where OmegaConf is not installed.
MISSING: Any = "???"

# The names are Hugging Face's (model_type).
Family = Literal["llama", "mistral", "qwen2", "qwen3"]


class Traits(NamedTuple):
    """What the attention of a family has beyond Llama's.

    Attributes:
        add_qkv_bias: query, key and value have a bias.
        qk_layernorm: query and key have an RMSNorm over the channels of a head.
    """

    add_qkv_bias: bool = False
    qk_layernorm: bool = False


_TRAITS: dict[Family, Traits] = {
    "llama": Traits(),
    "mistral": Traits(),
    "qwen2": Traits(add_qkv_bias=True),
    "qwen3": Traits(qk_layernorm=True),
}


@dataclass(frozen=True)
class ModelConfig:
    """A decoder with RMSNorm, SwiGLU, rotary embedding and grouped-query attention; its family adds biases or norms.

    A recipe with ``checkpoint.load_base`` takes from the base what it does not give itself.
    """

    num_layers: Annotated[int, Range(1, 2048)] = MISSING  # decoder layers
    hidden_size: Annotated[int, Range(1, 2**20)] = MISSING  # channels of the residual stream
    ffn_hidden_size: Annotated[int, Range(1, 2**24)] = MISSING  # channels inside the SwiGLU
    num_attention_heads: Annotated[int, Range(1, 2**16)] = MISSING  # query heads
    num_query_groups: Annotated[int, Range(1, 2**16)] = MISSING  # KV heads
    vocab_size: Annotated[int, Range(1, 2**28)] = MISSING  # tokens; rows of the embedding
    max_position_embeddings: Count = MISSING  # tokens, the longest sequence
    # head dimension; null: hidden_size / num_attention_heads
    kv_channels: Annotated[int, Range(1, 2**16)] | None = None
    rotary_base: Annotated[float, Range(1, 1e30)] = 10000.0  # theta of the rotary embedding
    # Llama 3's frequency scaling (8.0 in 3.1, 32.0 in 3.2); null: plain
    rotary_scaling_factor: Annotated[float, Range(1e-3, 1e6)] | None = None
    norm_epsilon: Annotated[float, Range(1e-30, 1)] = 1e-5  # of RMSNorm
    # standard deviation of weights that no checkpoint brings
    init_method_std: Annotated[float, Range(1e-30, 1000)] = 0.02
    share_embeddings_and_output_weights: bool = False  # the output layer is the embedding
    # as Hugging Face names it; qwen2 has a bias in query, key and value, qwen3 an RMSNorm over each head of query and key
    family: Family = "llama"

    @property
    def head_dim(self) -> int:
        return self.kv_channels or self.hidden_size // self.num_attention_heads

    @property
    def add_qkv_bias(self) -> bool:
        return _TRAITS[self.family].add_qkv_bias

    @property
    def qk_layernorm(self) -> bool:
        return _TRAITS[self.family].qk_layernorm

    def check(self) -> None:
        """Raises ConfigError for sizes that do not fit together. (Reading a recipe finds missing values.)"""
        check_ranges(self, "model")
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
