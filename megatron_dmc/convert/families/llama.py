"""Llama 2, 3, 3.1 and 3.2, and what is built like them, such as SmolLM2."""

from megatron_dmc.convert.families.family import SLIDING, HuggingFaceFamily

LLAMA = HuggingFaceFamily(
    architecture="LlamaForCausalLM",
    defaults={"max_position_embeddings": 2048},
    must_be=(
        ("attention_bias", False, "attention biases are not supported in a Llama"),
        ("sliding_window", None, SLIDING),
    ),
    writes={"attention_bias": False, "mlp_bias": False},
    head_divides=True,
)
