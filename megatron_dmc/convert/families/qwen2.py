"""Qwen2 and Qwen2.5: Llama with a bias in query, key and value."""

from megatron_dmc.convert.families.family import SLIDING, HuggingFaceFamily
from megatron_dmc.convert.rows import qkv

QWEN2 = HuggingFaceFamily(
    architecture="Qwen2ForCausalLM",
    defaults={"max_position_embeddings": 32768, "num_key_value_heads": 32},
    # A window may be named and switched off.
    must_be=(("use_sliding_window", False, SLIDING),),
    rows=(qkv("bias"),),
    writes={"use_sliding_window": False},
)
