"""Qwen3, dense: Llama with an RMSNorm over each head of query and key, and heads as wide as it says."""

from megatron_dmc.convert.families.family import SLIDING, HuggingFaceFamily
from megatron_dmc.convert.rows import single


def _norm(name: str) -> tuple[str, str]:
    return (
        f"decoder.layers.{{layer}}.self_attention.{name}_layernorm.weight",
        f"model.layers.{{layer}}.self_attn.{name}_norm.weight",
    )


QWEN3 = HuggingFaceFamily(
    architecture="Qwen3ForCausalLM",
    defaults={"max_position_embeddings": 32768, "num_key_value_heads": 32, "head_dim": 128},
    must_be=(
        ("attention_bias", False, "attention biases are not supported in a Qwen3"),
        ("use_sliding_window", False, SLIDING),
    ),
    rows=tuple(single(*_norm(name), lambda m: (m.head_dim,)) for name in "qk"),
    writes={"attention_bias": False, "use_sliding_window": False},
)
