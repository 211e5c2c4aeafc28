"""The arguments of a Megatron-LM run -> ModelConfig and DMCConfig."""

import sys
from collections.abc import Mapping
from typing import Any

from megatron_dmc.config import PAPER_OMEGA_FLOOR, ConfigError, DMCConfig
from megatron_dmc.model.model_config import ModelConfig

# Argument, and the value that a Llama has, also where the argument is absent.
_MUST_BE = (
    ("position_embedding_type", "rope"),
    ("normalization", "RMSNorm"),
    ("swiglu", True),
    ("add_bias_linear", False),
    ("add_qkv_bias", False),
    ("qk_layernorm", False),
    ("apply_layernorm_1p", False),
    ("rotary_percent", 1.0),
    ("rotary_interleaved", False),
    ("rotary_seq_len_interpolation_factor", None),
    ("use_rope_scaling", False),
    ("no_rope_freq", None),
    ("multi_latent_attention", False),
    ("attention_output_gate", False),
    ("qk_l2_norm", False),
    ("softmax_type", "vanilla"),
    ("experimental_attention_variant", None),
    ("apply_residual_connection_post_layernorm", False),
    ("layernorm_zero_centered_gamma", False),
    ("squared_relu", False),
    ("quick_geglu", False),
    ("glu_linear_offset", 0.0),
    ("activation_func_clamp_value", None),
    ("mtp_num_layers", None),
    ("heterogeneous_layers_config_path", None),
    ("window_size", None),
    ("num_experts", None),
    ("pipeline_model_parallel_size", 1),
    ("expert_model_parallel_size", 1),
)
_PLAIN = (bool, int, float, str, type(None))
_SIZES = (
    *("num_layers", "hidden_size", "ffn_hidden_size", "num_attention_heads", "num_query_groups", "kv_channels"),
    *("padded_vocab_size", "max_position_embeddings", "rotary_base", "norm_epsilon", "tensor_model_parallel_size"),
)
# Absent, they are not what a Llama has.
_MUST_BE_THERE = ("position_embedding_type", "normalization", "swiglu", "add_bias_linear")


def parse_arguments(arguments: Mapping[str, Any]) -> tuple[ModelConfig, DMCConfig | None]:
    """Sizes of the whole model, and what DMC adds: None for a run of stock Megatron-LM.

    Raises:
        ConfigError: an argument is absent, or the model is not one that this package can represent.
    """
    # A hostile value may be anything that can be unpickled, and may not even be compared. A window is a pair of numbers.
    checked = {name for name, _ in _MUST_BE} | {name for name in arguments if str(name).startswith("dmc_")}
    for name in sorted(checked & set(arguments)):
        if not isinstance(arguments[name], _PLAIN):
            raise ConfigError(f"{name} is a {type(arguments[name]).__name__}, which is not supported")
    arguments = {name: value for name, value in arguments.items() if isinstance(value, _PLAIN)}
    for name, plain in _MUST_BE:
        if name not in arguments and name in _MUST_BE_THERE:
            raise ConfigError(f"args has no {name}; save the checkpoint anew, with a Megatron-LM of 2024 or later")
        if arguments.get(name, plain) != plain:
            raise ConfigError(f"{name} {arguments[name]!r} is not supported; only {plain!r} is")
    heads, hidden = _integer(arguments, "num_attention_heads"), _integer(arguments, "hidden_size")
    grouped = arguments.get("group_query_attention", False)
    head_dim = _integer(arguments, "kv_channels") if arguments.get("kv_channels") is not None else None
    model = ModelConfig(
        num_layers=_integer(arguments, "num_layers"),
        hidden_size=hidden,
        ffn_hidden_size=_integer(arguments, "ffn_hidden_size"),
        num_attention_heads=heads,
        num_query_groups=_integer(arguments, "num_query_groups") if grouped else heads,
        # Megatron-LM's own padding included: it does not say how many of them are tokens.
        vocab_size=_integer(arguments, "padded_vocab_size"),
        max_position_embeddings=_integer(arguments, "max_position_embeddings"),
        kv_channels=None if head_dim is None or head_dim * heads == hidden else head_dim,
        rotary_base=_number(arguments, "rotary_base", 10000.0),
        norm_epsilon=_number(arguments, "norm_epsilon" if "norm_epsilon" in arguments else "layernorm_epsilon"),
        init_method_std=_number(arguments, "init_method_std", 0.02),
        share_embeddings_and_output_weights=not arguments.get("untie_embeddings_and_output_weights", False),
    )
    model.check()
    return model, _dmc(arguments)


def differences(first: Mapping[str, Any], other: Mapping[str, Any]) -> list[str]:
    """Arguments by which two ranks of one checkpoint cannot differ, and do."""
    names = {"iteration", *_SIZES, *(name for name, _ in _MUST_BE), *(x for x in first if str(x).startswith("dmc_"))}
    return sorted(name for name in names if _plain(first.get(name)) != _plain(other.get(name)))


def _plain(value: Any) -> Any:
    """What can be compared of a value."""
    return value if isinstance(value, _PLAIN) else type(value).__name__


def _dmc(arguments: Mapping[str, Any]) -> DMCConfig | None:
    """The settings with which this package computes what the authors' inference computes.

    Theirs reads its decisions from the last channel of key and query, less and plus ``dmc_init_val``, adds bfloat16's epsilon
    to the weight whatever the model's dtype, and merges at once.
    """
    if "dmc_init_val" not in arguments:
        return None
    if arguments.get("dmc_is_stage_one", False):
        raise ConfigError(
            "dmc_is_stage_one is set: the run was only freeing the decisions' channel, and the model does not merge yet; "
            "name a checkpoint of the stage after it"
        )
    window = arguments.get("dmc_window_size", 12)
    if type(window) is not int or window < 0:
        raise ConfigError(f"dmc_window_size must be a number of tokens, got {window!r}")
    return DMCConfig(
        target_compression_ratio=_number(arguments, "dmc_cr", 4.0),
        decision_source="neuron",
        decision_bias=_number(arguments, "dmc_init_val", 5.0),
        omega_floor=PAPER_OMEGA_FLOOR,
        temperature=_number(arguments, "dmc_temp", 0.1),
        # Not local_window, which delays decisions: theirs counts a slot's last tokens only, in inference, too. 0: all of them.
        window_size=window or None,
        # Their bfloat16 logits are averaged over a KV head's queries, never over the heads of a layer (DMC-C).
        per_layer=False,
    )


def _integer(arguments: Mapping[str, Any], name: str) -> int:
    value = arguments.get(name)
    if type(value) is not int or value < 1:
        raise ConfigError(
            f"args: {name} must be a whole number >= 1, got {value!r}; the file is damaged, fetch it again"
        )
    return value


def _number(arguments: Mapping[str, Any], name: str, absent: float | None = None) -> float:
    value = arguments.get(name, absent)
    if type(value) not in (int, float) or not 0 < value <= sys.float_info.max:
        raise ConfigError(f"args: {name} must be a number > 0, got {value!r}; the file is damaged, fetch it again")
    return float(value)
