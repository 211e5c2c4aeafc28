"""Model types that people ask for and that cannot be compressed here, and why."""

from typing import Any

_EXPERTS = "its layers are mixtures of experts, which are not supported"
_LATENT = "its multi-head latent attention (MLA) caches one latent vector for all heads, so no head has keys to merge"
_HYBRID = "some of its layers are no attention over a cache (linear attention, convolutions, state-space layers)"
_WINDOWS = "some of its layers attend to a sliding window, which is not supported"
_OTHER_LAYERS = "its norms, biases, activation or rotary embedding are not those of a Llama"
_UNEQUAL = "its layers have unequal heads, or none"
_PICTURES = "it takes more than text"

REASONS: dict[str, str] = {
    **dict.fromkeys(("mixtral", "qwen2_moe", "qwen3_moe", "olmoe", "phimoe", "granitemoe", "dbrx", "jetmoe"), _EXPERTS),
    **dict.fromkeys(("ernie4_5_moe", "glm4_moe", "minimax_m2", "hunyuan_v1_moe", "dots1"), _EXPERTS),
    **dict.fromkeys(("deepseek_v2", "deepseek_v3", "deepseek_v32", "kimi_k2", "minicpm3", "longcat_flash"), _LATENT),
    **dict.fromkeys(("qwen3_next", "qwen3_5", "qwen3_5_moe", "qwen3_5_text", "jamba", "bamba", "falcon_h1"), _HYBRID),
    **dict.fromkeys(("nemotron_h", "granitemoehybrid", "zamba", "zamba2", "mamba", "mamba2", "lfm2"), _HYBRID),
    **dict.fromkeys(("recurrent_gemma", "minimax", "kimi_linear", "olmo_hybrid"), _HYBRID),
    **dict.fromkeys(("gemma2", "gemma3", "gemma3_text", "gemma3n", "gemma4", "gpt_oss"), _WINDOWS),
    **dict.fromkeys(("cohere2", "ministral", "exaone4", "olmo3", "gpt_neo", "vaultgemma"), _WINDOWS),
    "smollm3": "every fourth of its layers has no rotary embedding (NoPE), which is not supported",
    "llama4": f"{_EXPERTS}, and some of its layers have no rotary embedding",
    "llama4_text": f"{_EXPERTS}, and some of its layers have no rotary embedding",
    **dict.fromkeys(
        ("gemma", "gpt2", "gptj", "gpt_neox", "gpt_bigcode", "opt", "bloom", "falcon", "mpt"), _OTHER_LAYERS
    ),
    **dict.fromkeys(("phi", "phi3", "starcoder2", "stablelm", "olmo", "olmo2", "cohere", "granite"), _OTHER_LAYERS),
    **dict.fromkeys(("glm", "glm4", "chatglm", "baichuan", "internlm2", "nemotron", "minicpm"), _OTHER_LAYERS),
    **dict.fromkeys(("openelm", "nemotron-nas", "deci", "decilm"), _UNEQUAL),
    **dict.fromkeys(("mllama", "llava", "llava_next", "qwen2_vl", "qwen2_5_vl", "qwen3_vl", "mistral3"), _PICTURES),
    **dict.fromkeys(("pixtral", "idefics3", "smolvlm", "paligemma", "internvl", "qwen2_audio"), _PICTURES),
}

# Keys of a configuration that no model here has, where its type is not known by name.
_TELLING: tuple[tuple[str, str], ...] = (
    ("kv_lora_rank", _LATENT),
    ("num_experts", _EXPERTS),
    ("num_local_experts", _EXPERTS),
    ("n_routed_experts", _EXPERTS),
    ("block_configs", _UNEQUAL),
    ("linear_num_key_heads", _HYBRID),
    ("mamba_d_state", _HYBRID),
    ("vision_config", _PICTURES),
)


def why_refused(model_type: Any, config: dict[str, Any]) -> str | None:
    """Why a model of a type that is no family here cannot be taken, as far as it is known."""
    if isinstance(model_type, str) and model_type in REASONS:
        return REASONS[model_type]
    return next((reason for key, reason in _TELLING if config.get(key) not in (None, 0)), None)
