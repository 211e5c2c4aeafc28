"""``config.json`` of a Hugging Face folder <-> ModelConfig and DMCConfig."""

import json
import sys
from pathlib import Path
from typing import Any

import torch

from megatron_dmc.config import ConfigError, DMCConfig
from megatron_dmc.convert.families import FAMILIES, HuggingFaceFamily, why_refused
from megatron_dmc.errors import is_too_long_number
from megatron_dmc.files import ABSENT, CHECKPOINT_MARK, checkpoint_below, why_no_file, why_no_folder
from megatron_dmc.hf.configuration_dmc import DMC_TYPE
from megatron_dmc.hf.export import DMC_CLASS
from megatron_dmc.model.model_config import Family, ModelConfig

# Llama 3's frequency scaling as megatron-core has it, with only the factor free.
_LLAMA3_SCALING = {"low_freq_factor": 1.0, "high_freq_factor": 4.0, "original_max_position_embeddings": 8192}

# Characters of a value in a message.
_MOST_SHOWN = 80

# Key, the value that every model has (also when the key is absent), and what another value means.
_MUST_BE = (
    ("transformers_weights", None, "weights under a name of their own are not read; load the model and save it anew"),
    ("quantization_config", None, "quantized weights are not supported; save the model in bfloat16 or float32"),
    ("hidden_act", "silu", "only SwiGLU (silu) is supported"),
    ("mlp_bias", False, "MLP biases are not supported"),
    ("num_experts", None, "mixture-of-experts models are not supported"),
    ("num_local_experts", None, "mixture-of-experts models are not supported"),
)


def read_config(folder: Path) -> tuple[ModelConfig, DMCConfig | None]:
    """Family and sizes, and what DMC adds (None for a plain model), from a folder's ``config.json``.

    Raises:
        ConfigError: there is none, it is damaged, or the model is not one that this package can represent.
    """
    if (problem := why_no_folder(folder)) is not None:
        raise ConfigError(f"{folder} {problem}; name the folder of a Hugging Face model")
    path = folder / "config.json"
    checkpoint = folder if (folder / CHECKPOINT_MARK).exists() else checkpoint_below(folder)
    if not path.exists() and checkpoint is not None:
        what = "a checkpoint" if checkpoint == folder else "a folder of checkpoints"
        raise ConfigError(
            f"{folder} is {what} of megatron_dmc, not a Hugging Face model: use {checkpoint} as it is, or run megatron-dmc "
            f"convert-to-hf {checkpoint} HF_FOLDER"
        )
    config = read_json(path)
    try:
        return parse_config(config)
    except ConfigError as error:
        raise ConfigError(f"{path}: {error}") from None


def parse_config(config: dict[str, Any]) -> tuple[ModelConfig, DMCConfig | None]:
    """:func:`read_config` of the file's content."""
    name, merges = _family(config)
    family = FAMILIES[name]
    given, config = config, {**family.defaults, **config}
    for key, plain, problem in (*_MUST_BE, *family.must_be):
        absent = config.get(key) is None and plain is False
        if not absent and config.get(key, plain) != plain:
            value = "" if isinstance(config[key], dict) else f" {config[key]!r}"
            if key not in given:
                value = f" is not there, which means{value}"
            raise ConfigError(f"{key}{value}: {problem}")
    expected = _architecture(family, merges)
    if (config.get("architectures") or [expected]) != [expected]:
        raise ConfigError(f"architectures {config['architectures']!r} is not supported; only {[expected]} is")
    layer_types = config.get("layer_types") or []
    if not isinstance(layer_types, list) or any(kind != "full_attention" for kind in layer_types):
        raise ConfigError(f"layer_types {layer_types!r} is not supported; all must be full_attention")
    heads = _integer(config, "num_attention_heads")
    hidden_size = _integer(config, "hidden_size")
    kv_heads = _integer(config, "num_key_value_heads", heads)
    if heads % kv_heads:
        default = "" if "num_key_value_heads" in given else ", as the file has none"
        raise ConfigError(
            f"num_attention_heads ({heads}) is not divisible by num_key_value_heads ({kv_heads}{default})"
        )
    head_dim = _integer(config, "head_dim", None)
    rotary_base, scaling_factor = _rotary(config)
    model = ModelConfig(
        num_layers=_integer(config, "num_hidden_layers"),
        hidden_size=hidden_size,
        ffn_hidden_size=_integer(config, "intermediate_size"),
        num_attention_heads=heads,
        num_query_groups=kv_heads,
        vocab_size=_integer(config, "vocab_size"),
        max_position_embeddings=_integer(config, "max_position_embeddings"),
        kv_channels=None if head_dim is None or head_dim * heads == hidden_size else head_dim,
        rotary_base=rotary_base,
        rotary_scaling_factor=scaling_factor,
        norm_epsilon=_number(config, "rms_norm_eps", 1e-6),
        init_method_std=_number(config, "initializer_range", 0.02),
        share_embeddings_and_output_weights=_boolean(config, "tie_word_embeddings"),
        family=name,
    )
    model.check()
    return model, _dmc(config) if merges else None


def check_exportable(model: ModelConfig) -> None:
    """Raises ConfigError for sizes that transformers refuses."""
    family = FAMILIES[model.family]
    if family.head_divides and model.hidden_size % model.num_attention_heads:
        raise ConfigError(
            f"model.hidden_size ({model.hidden_size}) is not divisible by model.num_attention_heads "
            f"({model.num_attention_heads}), which transformers' {family.architecture} requires; as a mistral (model.family), "
            "which is the same otherwise, it could be exported"
        )


def write_config(
    model: ModelConfig, dmc: DMCConfig | None, *, dtype: torch.dtype, special_tokens: dict[str, Any]
) -> dict[str, Any]:
    """The content of ``config.json``; the inverse of :func:`parse_config`.

    Args:
        dmc: None for a plain model.
        dtype: of the exported weights.
        special_tokens: ``bos_token_id`` and so on.

    Raises:
        ConfigError: sizes that transformers refuses.
    """
    check_exportable(model)
    family = FAMILIES[model.family]
    rotary: dict[str, Any] = {"rope_type": "default", "rope_theta": model.rotary_base}
    if model.rotary_scaling_factor is not None:
        rotary |= {"rope_type": "llama3", "factor": model.rotary_scaling_factor, **_LLAMA3_SCALING}
    return {
        "architectures": [_architecture(family, dmc is not None)],
        "model_type": model.family if dmc is None else DMC_TYPE + model.family,
        "num_hidden_layers": model.num_layers,
        "hidden_size": model.hidden_size,
        "intermediate_size": model.ffn_hidden_size,
        "num_attention_heads": model.num_attention_heads,
        "num_key_value_heads": model.num_query_groups,
        "head_dim": model.head_dim,
        "vocab_size": model.vocab_size,
        "max_position_embeddings": model.max_position_embeddings,
        "rope_parameters": rotary,
        "rms_norm_eps": model.norm_epsilon,
        "initializer_range": model.init_method_std,
        "tie_word_embeddings": model.share_embeddings_and_output_weights,
        "hidden_act": "silu",
        "attention_dropout": 0.0,
        **family.writes,
        "dtype": str(dtype).removeprefix("torch."),
        # A configuration class has defaults for these that belong to one tokenizer: say None where there is none.
        **{name: special_tokens.get(name) for name in ("bos_token_id", "eos_token_id", "pad_token_id")},
        **({} if dmc is None else {"dmc": dmc.to_dict()}),
    }


def read_json(path: Path) -> dict[str, Any]:
    """A JSON file that holds an object.

    Raises:
        ConfigError: it does not exist or does not.
    """
    problem = why_no_file(path)
    if problem == ABSENT:
        raise ConfigError(f"{path} does not exist; is {path.parent} the folder of a Hugging Face model?")
    if problem is not None:
        raise ConfigError(f"{path} {problem}")
    try:
        content = json.loads(path.read_text(encoding="utf-8"))
    except (OSError, ValueError, RecursionError) as error:
        if is_too_long_number(error):
            raise ConfigError(f"{path} holds a number of thousands of digits; fetch or save it again") from None
        raise ConfigError(f"{path} is not JSON: {error}") from None
    if not isinstance(content, dict):
        raise ConfigError(f"{path} holds no JSON object; fetch or save it again")
    return content


def _family(config: dict[str, Any]) -> tuple[Family, bool]:
    """The family, and whether it merges."""
    model_type = config.get("model_type")
    name = model_type.removeprefix(DMC_TYPE) if isinstance(model_type, str) else None
    if name in FAMILIES:
        return name, name != model_type
    if (reason := why_refused(model_type, config)) is not None:
        raise ConfigError(f"model_type {model_type!r} is not supported: {reason}; {', '.join(FAMILIES)} are")
    named = repr(model_type)[:_MOST_SHOWN]
    raise ConfigError(f"model_type {named} is not supported; {', '.join(FAMILIES)} are, without and with DMC")


def _architecture(family: HuggingFaceFamily, merges: bool) -> str:
    return (DMC_CLASS if merges else "") + family.architecture


def _rotary(config: dict[str, Any]) -> tuple[float, float | None]:
    """Base and Llama 3's scaling factor, as transformers 5 (``rope_parameters``) or 4 wrote them."""
    parameters, scaling = (config.get(name) or {} for name in ("rope_parameters", "rope_scaling"))
    # transformers takes rope_scaling, and with it the default base: hardly what was meant.
    if parameters and scaling and parameters != scaling:
        raise ConfigError("rope_parameters and rope_scaling differ; keep one of them")
    parameters = parameters or scaling
    if not isinstance(parameters, dict):
        raise ConfigError(f"rope parameters must be an object, got {parameters!r}")
    if any(isinstance(value, dict) for value in parameters.values()):
        raise ConfigError("rope parameters differ between kinds of layers, which is not supported")
    for where in (config, parameters):
        if where.get("partial_rotary_factor") not in (None, 1, 1.0):
            raise ConfigError(f"partial_rotary_factor {where['partial_rotary_factor']!r} is not supported")
    base = _number(parameters if "rope_theta" in parameters else config, "rope_theta", 10000.0)
    kind = parameters.get("rope_type", parameters.get("type", "default"))
    if kind == "default":
        return base, None
    if kind != "llama3":
        raise ConfigError(
            f"rope_type {kind!r} is not supported; only default and llama3 are: without it the model has its original length"
        )
    for name, value in _LLAMA3_SCALING.items():
        if parameters.get(name) != value:
            raise ConfigError(
                f"rope parameter {name} must be {value:g} (megatron-core's constant), got {parameters.get(name)!r}"
            )
    return base, _number(parameters, "factor")


def _dmc(config: dict[str, Any]) -> DMCConfig:
    values = config.get("dmc")
    if not isinstance(values, dict):
        raise ConfigError(f"dmc must be an object with the DMC settings, got {values!r}")
    try:
        return DMCConfig.from_dict(values)
    except (ConfigError, TypeError) as error:
        raise ConfigError(f"dmc: {error}") from None


_REQUIRED: Any = object()


def _number(values: dict[str, Any], name: str, default: Any = _REQUIRED) -> float:
    value = _value(values, name, default)
    if isinstance(value, bool) or not isinstance(value, (int, float)) or not 0 < value <= sys.float_info.max:
        raise ConfigError(f"{name} must be a number > 0, got {value!r}")
    return float(value)


def _integer(values: dict[str, Any], name: str, default: Any = _REQUIRED) -> Any:
    value = _value(values, name, default)
    if value is default:
        return value
    if isinstance(value, list):
        raise ConfigError(f"{name} is a list: layers of unequal sizes are not supported")
    if isinstance(value, bool) or not isinstance(value, int) or value < 1:
        raise ConfigError(f"{name} must be an integer >= 1, got {value!r}")
    return value


def _boolean(values: dict[str, Any], name: str) -> bool:
    value = _value(values, name, False)
    if not isinstance(value, bool):
        raise ConfigError(f"{name} must be true or false, got {value!r}")
    return value


def _value(values: dict[str, Any], name: str, default: Any) -> Any:
    value = values.get(name)
    if value is None and default is _REQUIRED:
        raise ConfigError(f"{name} is missing")
    return default if value is None else value
