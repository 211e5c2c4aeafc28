"""Mistral with full attention: 7B v0.2 and v0.3, Nemo, Small. The first version's window of 4096 tokens is refused."""

from megatron_dmc.convert.families.family import SLIDING, HuggingFaceFamily

MISTRAL = HuggingFaceFamily(
    architecture="MistralForCausalLM",
    defaults={"max_position_embeddings": 131072, "num_key_value_heads": 8, "sliding_window": 4096},
    must_be=(
        ("sliding_window", None, f"{SLIDING}, such as Mistral 7B v0.3, which says null"),
        ("attention_bias", False, "attention biases are not supported in a Mistral"),
    ),
    writes={"sliding_window": None},
    plain_tokenizer=True,
)
