"""config.json of every family: what is read, and what is refused by name."""

import json
from pathlib import Path
from typing import Any

import pytest
import torch
from transformers import AutoConfig
from transformers.models.auto.configuration_auto import CONFIG_MAPPING_NAMES

from megatron_dmc.config import ConfigError, DMCConfig
from megatron_dmc.convert.families import FAMILIES
from megatron_dmc.convert.families.refused import REASONS
from megatron_dmc.convert.hf_config import parse_config, read_config, write_config
from megatron_dmc.model.model_config import ModelConfig
from tests.support.llama3_rotary import LLAMA3

# Types whose code comes with their weights: transformers itself has none.
OUTSIDE = {"kimi_k2", "chatglm", "baichuan", "internlm2", "minicpm", "openelm", "nemotron-nas", "deci", "decilm"}
PLAIN: dict[str, Any] = {
    "architectures": ["LlamaForCausalLM"],
    "model_type": "llama",
    "hidden_size": 32,
    "intermediate_size": 48,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "vocab_size": 300,
}
OLD_LLAMA3 = {key: value for key, value in LLAMA3.items() if key != "rope_theta"}
MODEL = ModelConfig(2, 32, 48, 4, 2, 300, 131072, rotary_base=500000.0, norm_epsilon=1e-6)


def plain(family: Any) -> dict[str, Any]:
    """A file that says as little as possible."""
    values = PLAIN | {"model_type": family, "architectures": [FAMILIES[family].architecture]}
    return values | ({"sliding_window": None} if family == "mistral" else {})


@pytest.mark.parametrize("family", FAMILIES)
def test_keys_that_a_file_lacks_have_the_familys_defaults(family: Any) -> None:
    values = plain(family) | {"num_attention_heads": 32, "hidden_size": 320}
    model, dmc = parse_config(values)
    default = AutoConfig.for_model(**values)
    assert dmc is None and model.family == family
    assert model.num_query_groups == default.num_key_value_heads
    assert model.head_dim == (getattr(default, "head_dim", None) or 10)
    assert model.max_position_embeddings == default.max_position_embeddings
    assert model.norm_epsilon == default.rms_norm_eps
    assert model.init_method_std == default.initializer_range
    assert model.rotary_base == default.rope_parameters["rope_theta"]
    assert not model.share_embeddings_and_output_weights


@pytest.mark.parametrize(
    ("rotary", "base", "factor"),
    [
        ({"rope_parameters": {"rope_type": "default", "rope_theta": 1000.0}}, 1000.0, None),
        ({"rope_parameters": LLAMA3}, 500000.0, 8.0),
        ({"rope_theta": 500000, "rope_scaling": None}, 500000.0, None),
        ({"rope_theta": 500000.0, "rope_scaling": OLD_LLAMA3}, 500000.0, 8.0),
        ({"rope_theta": 500000.0, "rope_scaling": {"type": "llama3", **OLD_LLAMA3, "factor": 32.0}}, 500000.0, 32.0),
        ({"rope_parameters": LLAMA3, "rope_scaling": LLAMA3}, 500000.0, 8.0),
    ],
    ids=["v5", "v5-llama3", "v4", "v4-llama3", "v4-llama3-32", "both"],
)
def test_rotary_settings_of_transformers_4_and_5(rotary: dict[str, Any], base: float, factor: float | None) -> None:
    model, _ = parse_config(PLAIN | rotary)
    assert (model.rotary_base, model.rotary_scaling_factor) == (base, factor)


@pytest.mark.parametrize("head_dim", [8, 16])
def test_head_dimension(head_dim: int) -> None:
    for family in FAMILIES:
        model, _ = parse_config(plain(family) | {"head_dim": head_dim, "num_key_value_heads": 2})
        assert model.head_dim == head_dim


@pytest.mark.parametrize("dmc", [None, DMCConfig(decision_source="neuron", window_size=12, per_layer=True)])
@pytest.mark.parametrize("tied", [False, True])
@pytest.mark.parametrize("factor", [None, 32.0])
@pytest.mark.parametrize("family", FAMILIES)
def test_write_is_the_inverse_of_parse(family: str, dmc: DMCConfig | None, tied: bool, factor: float | None) -> None:
    changes = {"share_embeddings_and_output_weights": tied, "rotary_scaling_factor": factor, "family": family}
    model = ModelConfig(**vars(MODEL) | changes)
    written = write_config(model, dmc, dtype=torch.bfloat16, special_tokens={"eos_token_id": 0})
    assert parse_config(json.loads(json.dumps(written))) == (model, dmc)


@pytest.mark.parametrize("family", FAMILIES)
def test_transformers_reads_what_is_written(family: Any, tmp_path: Path) -> None:
    model = ModelConfig(**vars(MODEL) | {"kv_channels": 16, "rotary_scaling_factor": 8.0, "family": family})
    written = write_config(model, None, dtype=torch.bfloat16, special_tokens={"eos_token_id": [0, 7]})
    (tmp_path / "config.json").write_text(json.dumps(written))
    config = AutoConfig.from_pretrained(tmp_path)
    assert f"{type(config).__name__.removesuffix('Config')}ForCausalLM" == FAMILIES[family].architecture
    assert all(kind == "full_attention" for kind in getattr(config, "layer_types", None) or [])
    assert getattr(config, "sliding_window", None) is None
    assert config.rope_parameters == LLAMA3
    assert (config.head_dim, config.num_key_value_heads, config.rms_norm_eps) == (16, 2, 1e-6)
    assert (config.eos_token_id, config.bos_token_id, config.dtype) == ([0, 7], None, torch.bfloat16)
    assert not config.tie_word_embeddings


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (
            {"model_type": "mixtral", "num_local_experts": 8},
            "model_type 'mixtral' is not supported: its layers are mixtures of experts",
        ),
        ({"num_experts": 64}, "mixture-of-experts"),
        ({"model_type": "mistral", "sliding_window": 4096}, "sliding_window 4096: sliding-window"),
        ({"layer_types": ["full_attention", "sliding_attention"]}, "layer_types"),
        ({"model_type": "qwen3"}, "architectures ['LlamaForCausalLM'] is not supported; only ['Qwen3ForCausalLM'] is"),
        ({"model_type": ["llama"]}, "model_type"),
        ({"architectures": ["LlamaForSequenceClassification"]}, "LlamaForSequenceClassification"),
        ({"attention_bias": True}, "attention_bias True"),
        ({"mlp_bias": True}, "mlp_bias True"),
        ({"hidden_act": "gelu"}, "hidden_act 'gelu'"),
        ({"quantization_config": {"quant_method": "gptq"}}, "quantized"),
        ({"rope_scaling": {"rope_type": "yarn", "factor": 4.0}}, "rope_type 'yarn'"),
        ({"rope_parameters": {**LLAMA3, "low_freq_factor": 2.0}}, "low_freq_factor must be 1"),
        ({"rope_parameters": {**LLAMA3, "original_max_position_embeddings": 4096}}, "must be 8192"),
        ({"rope_parameters": {"rope_theta": 1e4, "partial_rotary_factor": 0.5}}, "partial_rotary_factor 0.5"),
        ({"rope_parameters": "llama3"}, "must be an object"),
        (
            {"rope_parameters": LLAMA3, "rope_scaling": {"type": "linear", "factor": 2.0}},
            "rope_scaling differ; keep one",
        ),
        ({"rope_theta": 10**400}, "rope_theta must be a number > 0"),
        ({"rope_theta": "1e4"}, "rope_theta must be a number > 0, got '1e4'"),
        ({"rms_norm_eps": float("nan")}, "rms_norm_eps must be a number > 0, got nan"),
        ({"hidden_size": None}, "hidden_size is missing"),
        ({"hidden_size": 32.0}, "hidden_size must be an integer >= 1, got 32.0"),
        ({"num_hidden_layers": True}, "num_hidden_layers must be an integer >= 1, got True"),
        ({"vocab_size": -1}, "vocab_size must be an integer >= 1, got -1"),
        ({"tie_word_embeddings": "yes"}, "tie_word_embeddings must be true or false"),
        ({"num_key_value_heads": 3}, "divisible"),
        ({"head_dim": 7}, "even"),
        ({"layer_types": 3}, "layer_types"),
        ({"model_type": "dmc_llama", "architectures": ["LlamaForCausalLM"]}, "only ['DMCLlamaForCausalLM'] is"),
        ({"model_type": "dmc_llama", "architectures": ["DMCLlamaForCausalLM"]}, "dmc must be an object"),
        ({"model_type": "dmc_llama", "architectures": None, "dmc": {"decision_bias": "5"}}, "decision_bias"),
    ],
)
def test_other_models_are_refused_in_one_line(tmp_path: Path, change: dict[str, Any], message: str) -> None:
    (tmp_path / "config.json").write_text(json.dumps(PLAIN | change))
    with pytest.raises(ConfigError) as error:
        read_config(tmp_path)
    assert message in str(error.value)
    assert "config.json" in str(error.value) and "\n" not in str(error.value)


@pytest.mark.parametrize(
    ("family", "change", "message"),
    [
        ("mistral", {"sliding_window": 4096}, "sliding_window 4096: sliding-window attention is not supported"),
        ("qwen2", {"use_sliding_window": True}, "use_sliding_window True: sliding-window attention is not supported"),
        ("qwen3", {"use_sliding_window": True, "max_window_layers": 1}, "use_sliding_window True: sliding-window"),
        ("qwen3", {"layer_types": ["full_attention", "sliding_attention"]}, "all must be full_attention"),
        ("qwen3", {"attention_bias": True}, "attention_bias True: attention biases are not supported in a Qwen3"),
        ("qwen2", {"rope_scaling": {"rope_type": "yarn", "factor": 4.0}}, "rope_type 'yarn' is not supported"),
        (
            "qwen3",
            {"rope_parameters": {"full_attention": {"rope_type": "yarn", "rope_theta": 1e6}}},
            "rope parameters differ between kinds of layers",
        ),
        (
            "qwen2",
            {"num_key_value_heads": 3},
            r"num_attention_heads \(4\) is not divisible by num_key_value_heads \(3\)",
        ),
        ("mistral", {"attention_bias": True}, "attention_bias True: attention biases are not supported in a Mistral"),
        ("qwen2", {"num_experts": 64}, "num_experts 64: mixture-of-experts models are not supported"),
        ("mistral", {"num_key_value_heads": [2, 4]}, "num_key_value_heads is a list: layers of unequal sizes"),
        ("mistral", {"num_attention_heads": [4, 4]}, "num_attention_heads is a list: layers of unequal sizes"),
        ("qwen2", {"quantization_config": {"bits": 4}}, "quantization_config: quantized weights are not supported"),
    ],
)
def test_what_a_family_may_not_have(family: str, change: dict[str, Any], message: str) -> None:
    with pytest.raises(ConfigError, match=message) as error:
        parse_config(plain(family) | {"num_key_value_heads": 2} | change)
    assert "\n" not in str(error.value)


def test_a_mistral_that_does_not_speak_of_windows_has_one() -> None:
    """So transformers reads it."""
    values = {name: value for name, value in plain("mistral").items() if name != "sliding_window"}
    assert AutoConfig.for_model(**values).sliding_window == 4096
    with pytest.raises(ConfigError, match=r"sliding_window is not there, which means 4096: .* says null"):
        parse_config(values)


def test_a_default_that_does_not_fit_is_named_as_one() -> None:
    message = r"num_attention_heads \(4\) is not divisible by num_key_value_heads \(32, as the file has none\)"
    with pytest.raises(ConfigError, match=message):
        parse_config(plain("qwen2"))


def test_a_long_type_is_cut() -> None:
    with pytest.raises(ConfigError) as error:
        parse_config(PLAIN | {"model_type": "x" * 100_000})
    assert len(str(error.value)) < 300


def test_null_is_as_absent_where_absent_is_off() -> None:
    for family in FAMILIES:
        nulls = {"attention_bias": None, "mlp_bias": None, "use_sliding_window": None, "num_key_value_heads": None}
        parse_config(plain(family) | nulls)


def test_a_window_may_be_named_and_switched_off() -> None:
    off = {"use_sliding_window": False, "sliding_window": 32768, "max_window_layers": 0, "num_key_value_heads": 2}
    for family in ("qwen2", "qwen3"):
        parse_config(plain(family) | off)


def test_others_are_refused_by_name() -> None:
    for name, reason in REASONS.items():
        assert name in CONFIG_MAPPING_NAMES or name in OUTSIDE, name
        with pytest.raises(ConfigError, match="is not supported: ") as error:
            parse_config(PLAIN | {"model_type": name})
        assert reason in str(error.value) and "\n" not in str(error.value)
    assert not OUTSIDE & set(CONFIG_MAPPING_NAMES)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"kv_lora_rank": 512}, "MLA"),
        ({"n_routed_experts": 8}, "mixtures of experts"),
        ({"block_configs": [{}]}, "unequal heads"),
        ({"vision_config": {}}, "takes more than text"),
        ({"num_experts": 0}, "is not supported; llama, mistral, qwen2, qwen3 are"),
    ],
)
def test_a_type_that_nobody_knows_is_told_by_its_keys(change: dict[str, Any], message: str) -> None:
    with pytest.raises(ConfigError, match=message):
        parse_config(PLAIN | {"model_type": "brand_new"} | change)


@pytest.mark.parametrize(
    ("dmc", "message"),
    [
        ({"decision_bias": "5"}, "decision_bias"),
        ({"window_size": "12"}, "dmc"),
        ({"decision_source": "oracle"}, "decision_source"),
        ({"from_the_future": 1}, "from_the_future"),
        ({"seed": "x"}, "dmc"),
    ],
)
def test_bad_dmc_settings_are_refused_in_one_line(dmc: dict[str, Any], message: str) -> None:
    values = PLAIN | {"model_type": "dmc_llama", "architectures": ["DMCLlamaForCausalLM"], "dmc": dmc}
    with pytest.raises(ConfigError, match=message):
        parse_config(values)


@pytest.mark.parametrize("content", ["", "[1]", "{", b"\xff\xfe", "[" * 100_000])
def test_a_damaged_file_is_refused(tmp_path: Path, content: str | bytes) -> None:
    (tmp_path / "config.json").write_bytes(content if isinstance(content, bytes) else content.encode())
    with pytest.raises(ConfigError, match=r"config\.json"):
        read_config(tmp_path)


def test_a_folder_without_the_file_is_refused(tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match=r"config\.json does not exist"):
        read_config(tmp_path)
    with pytest.raises(ConfigError, match="does not exist; name the folder of a Hugging Face model"):
        read_config(tmp_path / "nowhere")


def test_sizes_that_transformers_refuses_are_not_written() -> None:
    model = ModelConfig(2, 30, 48, 4, 2, 300, 128, kv_channels=8)
    with pytest.raises(ConfigError, match="not divisible"):
        write_config(model, None, dtype=torch.float32, special_tokens={})
