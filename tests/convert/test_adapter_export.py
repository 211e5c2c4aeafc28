"""An adapter's checkpoint, exported merged and alone; its base is given, has moved, or is another one."""

import json
import shutil
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file
from transformers import AutoModel, AutoModelForCausalLM, AutoTokenizer

from megatron_dmc.checkpoint import CheckpointError, CheckpointInfo, SavedModel, save_checkpoint
from megatron_dmc.checkpoint.weights import model_state, only_decisions
from megatron_dmc.cli import main
from megatron_dmc.config import ConfigError, DMCConfig
from megatron_dmc.convert.from_hf import import_hf
from megatron_dmc.convert.hf_config import read_config, write_config
from megatron_dmc.convert.single_process import empty_model
from megatron_dmc.convert.to_checkpoint import placeholder_recipe
from megatron_dmc.convert.to_hf import export_adapter, export_hf
from megatron_dmc.hf.adapter import ADAPTER_FILE, _check_config
from megatron_dmc.hf.families import dmc_classes
from megatron_dmc.hf.families.llama import DMCLlamaForCausalLM
from megatron_dmc.inference.loading import load_model
from megatron_dmc.model.decision_projection import is_buffer
from tests.support.llama3_rotary import LLAMA3
from tests.support.llamas import TOKENS, load_megatron, save_random_base
from tests.support.scripts import load_script
from tests.support.strangers import run_as_stranger
from tests.support.tensors import hugging_face_tensors

DMC = {
    "merge": DMCConfig(decision_bias=0.5),
    "window": DMCConfig(decision_bias=0.5, local_window=4),
    "evict": DMCConfig(decision_bias=0.5, local_window=4, operation="evict"),
    "absorb": DMCConfig(decision_bias=0.5, local_window=4, operation="absorb"),
}


@dataclass
class Adapter:
    """A base as a Hugging Face folder and as a checkpoint, and the checkpoint of an adapter of it."""

    llama: Path
    base: Path
    checkpoint: Path


@pytest.fixture
def save_adapter(save_llama: Callable[..., Path], tokenizer_folder: Path, tmp_path: Path) -> Callable[..., Adapter]:
    """Saves a random adapter that merges about half of the tokens; keyword arguments are save_llama's."""

    def save(dmc: DMCConfig = DMC["window"], dtype: torch.dtype = torch.float32, **llama: Any) -> Adapter:
        folder = save_llama(seed=3, **llama)
        import_hf(folder, tmp_path / "base")
        model, _ = read_config(folder)
        network = empty_model(model, dmc, dtype)
        torch.manual_seed(5)
        with torch.no_grad():
            for name, parameter in network.named_parameters():
                if ".decision." in name:
                    parameter.normal_()
        base = SavedModel.open(tmp_path / "base").as_base_for(tmp_path / "run")
        info = CheckpointInfo("weights", placeholder_recipe(model, dmc).to_dict(), 1, 1, 0, 2.0, base=base)
        state = only_decisions(model_state([network]))
        return Adapter(
            folder, tmp_path / "base", save_checkpoint(tmp_path / "run", "final", state, info, tokenizer_folder)
        )

    return save


@pytest.mark.parametrize("dmc", DMC.values(), ids=DMC)
def test_merged_it_is_the_model_that_was_trained(
    save_adapter: Callable[..., Adapter], dmc: DMCConfig, tmp_path: Path
) -> None:
    adapter = save_adapter(dmc)
    export_hf(adapter.checkpoint, tmp_path / "merged")
    merged, base = hugging_face_tensors(tmp_path / "merged"), hugging_face_tensors(adapter.llama)
    decisions = {name for name in merged if ".decision." in name}
    assert len(decisions) == 4 and merged.keys() == base.keys() | decisions
    assert all(torch.equal(merged[name], base[name]) for name in base)
    exported = AutoModelForCausalLM.from_pretrained(tmp_path / "merged", trust_remote_code=True)
    positions = torch.arange(37).expand_as(TOKENS)
    with torch.no_grad():
        trained = load_model(adapter.checkpoint).model(TOKENS, positions, None)
        torch.testing.assert_close(exported(TOKENS).logits, trained, rtol=0, atol=1e-5)


@pytest.mark.parametrize(
    ("dmc", "dtype", "llama"),
    [
        ("merge", torch.float32, {}),
        ("evict", torch.float32, {"tie_word_embeddings": True}),
        ("window", torch.float32, {"rope_parameters": LLAMA3, "max_shard_size": "20KB"}),
        ("window", torch.bfloat16, {"head_dim": 16}),
    ],
    ids=["merge", "evict-tied", "llama3-sharded", "bf16-of-fp32-base"],
)
def test_with_its_base_it_is_the_merged_model(
    save_adapter: Callable[..., Adapter], dmc: str, dtype: torch.dtype, llama: dict[str, Any], tmp_path: Path
) -> None:
    adapter = save_adapter(DMC[dmc], dtype, **llama)
    export_hf(adapter.checkpoint, tmp_path / "merged")
    shutil.rmtree(adapter.base)  # an adapter that is exported alone does not need it
    export_adapter(adapter.checkpoint, tmp_path / "adapter")
    files = {path.name for path in tmp_path.joinpath("adapter").iterdir()}
    assert files == {path.name for path in tmp_path.joinpath("merged").iterdir()} - {"model.safetensors"} | {
        "adapter.safetensors"
    }
    assert set(load_file(tmp_path / "adapter" / "adapter.safetensors")) == {
        f"model.layers.{layer}.self_attn.decision.{name}" for layer in range(2) for name in ("weight", "bias")
    }
    for auto in (AutoModelForCausalLM, AutoModel):
        merged = auto.from_pretrained(tmp_path / "merged", trust_remote_code=True)
        joined = auto.from_pretrained(tmp_path / "adapter", base=adapter.llama, trust_remote_code=True)
        assert merged.dtype == joined.dtype == dtype and type(joined).__name__ == type(merged).__name__
        expected, found = merged.state_dict(), joined.state_dict()
        assert found.keys() == expected.keys()
        assert all(torch.equal(found[name], expected[name]) for name in expected)
    options = {"max_new_tokens": 9, "return_dict_in_generate": True, "output_logits": True}
    merged, joined = (
        DMCLlamaForCausalLM.from_pretrained(tmp_path / name, **arguments)
        for name, arguments in (("merged", {}), ("adapter", {"base": str(adapter.llama)}))
    )
    assert joined.config.name_or_path == str(tmp_path / "adapter")
    assert joined.generation_config.eos_token_id == merged.generation_config.eos_token_id == 0
    made = [model.generate(TOKENS, **options, do_sample=False) for model in (merged, joined)]
    assert torch.equal(made[0].sequences, made[1].sequences)
    assert all(torch.equal(a, b) for a, b in zip(made[0].logits, made[1].logits, strict=True))
    assert made[1].past_key_values.compression_ratio > 1.2
    assert AutoTokenizer.from_pretrained(tmp_path / "adapter")("one text").input_ids


STRANGER = """
import torch
from transformers import AutoModelForCausalLM

adapter, base, logits, again = sys.argv[1:]
torch.set_num_threads(1)
model = AutoModelForCausalLM.from_pretrained(adapter, base=base, trust_remote_code=True)
assert type(model).__module__.startswith("transformers_modules")
ids = torch.arange(2 * 37).mul(7).remainder(300).reshape(2, 37)
with torch.no_grad():
    assert torch.equal(model(ids).logits, torch.load(logits, weights_only=True))
model.save_pretrained(again)
merged = AutoModelForCausalLM.from_pretrained(again, trust_remote_code=True)
with torch.no_grad():
    assert torch.equal(model(ids).logits, merged(ids).logits)
try:
    AutoModelForCausalLM.from_pretrained(adapter, trust_remote_code=True)
except ValueError as error:
    assert str(error) == f"{adapter} is an adapter; name the folder of the model it was trained on with base="
    print("fine")
"""


def test_a_stranger_loads_it(save_adapter: Callable[..., Adapter], tmp_path: Path) -> None:
    """torch and transformers only, and a base in the form that transformers 4 wrote."""
    adapter = save_adapter()
    export_adapter(adapter.checkpoint, tmp_path / "adapter")
    path = adapter.llama / "config.json"
    config = json.loads(path.read_text())
    del config["rope_parameters"], config["head_dim"]
    path.write_text(json.dumps(config | {"rope_theta": 10000.0, "rope_scaling": None}))
    with torch.no_grad():
        logits = DMCLlamaForCausalLM.from_pretrained(tmp_path / "adapter", base=adapter.llama)(TOKENS).logits
    torch.save(logits, tmp_path / "logits.pt")
    arguments = [tmp_path / "adapter", adapter.llama, tmp_path / "logits.pt", tmp_path / "again"]
    assert "newly initialized" not in run_as_stranger(STRANGER, *arguments, folder=tmp_path)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"vocab_size": 301}, "its vocab_size is 301, the adapter's is 300"),
        ({"num_hidden_layers": 3}, "its num_hidden_layers is 3, the adapter's is 2"),
        ({"num_key_value_heads": 4}, "its num_key_value_heads is 4, the adapter's is 2"),
        ({"rms_norm_eps": 1e-6}, "its rms_norm_eps is 1e-06, the adapter's is 1e-05"),
        ({"tie_word_embeddings": True}, "its tie_word_embeddings is True, the adapter's is False"),
        ({"rope_parameters": {"rope_theta": 5e5, "rope_type": "default"}}, "its rope_theta is 500000.0, the adapter's"),
        ({"rope_parameters": LLAMA3 | {"rope_theta": 1e4}}, "its rope_type is 'llama3', the adapter's is 'default'"),
        ({"quantization_config": {"quant_method": "fp8"}}, "its quantization_config is"),
        ({"attention_bias": True}, "attention_bias must be False in a DMC model"),
        ({"model_type": "mistral"}, "the base of this adapter is a plain llama, got model_type 'mistral'"),
    ],
    ids=lambda value: next(iter(value)) if isinstance(value, dict) else "",
)
def test_another_models_folder_is_refused(
    save_adapter: Callable[..., Adapter], tmp_path: Path, change: dict[str, Any], message: str
) -> None:
    adapter = save_adapter()
    export_adapter(adapter.checkpoint, tmp_path / "adapter")
    path = adapter.llama / "config.json"
    path.write_text(json.dumps(json.loads(path.read_text()) | change))
    with pytest.raises(ValueError) as error:
        DMCLlamaForCausalLM.from_pretrained(tmp_path / "adapter", base=adapter.llama)
    assert message in str(error.value) and str(adapter.llama) in str(error.value) and "\n" not in str(error.value)


def test_folders_that_are_not_what_they_should_be(save_adapter: Callable[..., Adapter], tmp_path: Path) -> None:
    adapter, folder = save_adapter(), tmp_path / "adapter"
    export_adapter(adapter.checkpoint, folder)
    export_hf(adapter.checkpoint, tmp_path / "merged")

    def refused(message: str, path: Path, **arguments: Any) -> None:
        with pytest.raises(ValueError, match=message):
            DMCLlamaForCausalLM.from_pretrained(path, **arguments)

    refused("adapter is an adapter; name the folder of the model", folder)
    refused("merged holds no adapter.safetensors: it is no adapter; leave base out", tmp_path / "merged", base=folder)
    refused("a plain llama, got model_type 'dmc_llama'", folder, base=tmp_path / "merged")
    refused("nowhere is not a folder; huggingface_hub.snapshot_download", folder, base=tmp_path / "nowhere")
    with pytest.raises(ConfigError, match="adapter holds an adapter without its base's weights; name a merged export"):
        import_hf(folder, tmp_path / "again")
    weights = load_file(folder / "adapter.safetensors")
    save_file({name: weight[1:] for name, weight in weights.items()}, folder / "adapter.safetensors")
    refused(
        r"model.layers.0.self_attn.decision.bias has shape \[3\], config.json asks for \[4\]",
        folder,
        base=adapter.llama,
    )
    (folder / "adapter.safetensors").write_bytes(b"damaged")
    refused("adapter.safetensors cannot be read as safetensors", folder, base=adapter.llama)
    export_adapter(adapter.checkpoint, tmp_path / "whole")
    (adapter.llama / "model.safetensors").rename(adapter.llama / "pytorch_model.bin")
    refused("holds no model.safetensors and no index of several", tmp_path / "whole", base=adapter.llama)


def test_a_base_that_has_been_moved(
    save_adapter: Callable[..., Adapter], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    adapter = save_adapter()
    export_hf(adapter.checkpoint, tmp_path / "merged")
    moved = tmp_path / "elsewhere" / "base"
    moved.parent.mkdir()
    adapter.base.rename(moved)
    with pytest.raises(CheckpointError, match=f"its base {adapter.base} is not there; put it back, or name .* --base"):
        export_hf(adapter.checkpoint, tmp_path / "again")
    export_hf(adapter.checkpoint, tmp_path / "again", base=moved)
    for name, tensor in hugging_face_tensors(tmp_path / "merged").items():
        assert torch.equal(hugging_face_tensors(tmp_path / "again")[name], tensor)

    inspect, generate = ["inspect", "--tokens", "50"], ["generate", "--prompt", "one", "--max-new-tokens", "3"]
    for command in (inspect, generate):
        assert main([*command, str(adapter.checkpoint)]) == 1
        assert main([*command, str(adapter.checkpoint), "--base", str(moved)]) == 0
        assert main([*command, str(adapter.checkpoint), "--base", str(adapter.checkpoint)]) == 1
        *_, absent, other = capsys.readouterr().err.splitlines()
        assert f"its base {adapter.base} is not there" in absent
        assert f"is an adapter of another base than {adapter.checkpoint}" in other
        assert main([*command, str(moved), "--base", str(moved)]) == 1
        error = capsys.readouterr().err
        assert error.startswith(f"megatron-dmc: {moved} is no adapter, it holds all its weights; leave the base")
        assert error.count("\n") == 1


def test_a_base_that_is_no_checkpoint(
    save_adapter: Callable[..., Adapter], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    adapter = save_adapter()
    capsys.readouterr()
    for base, problem in (
        (adapter.llama, "is a Hugging Face model, not a checkpoint of megatron_dmc: run megatron-dmc convert-from-hf "),
        (adapter.base / "dmc.json", "is a file, not a folder; name the folder of one checkpoint"),
    ):
        assert main(["convert-to-hf", str(adapter.checkpoint), str(tmp_path / "out"), "--base", str(base)]) == 1
        error = capsys.readouterr().err
        assert f"{base} {problem}" in error and error.count("\n") == 1


def test_what_is_no_adapter(
    save_adapter: Callable[..., Adapter], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    adapter = save_adapter()
    message = f"{adapter.base} is no adapter, it holds all its weights; export it without --adapter"
    with pytest.raises(ConfigError, match=message):
        export_adapter(adapter.base, tmp_path / "out")
    with pytest.raises(ConfigError, match=f"{adapter.base} is no adapter, it holds all its weights; leave the base"):
        export_hf(adapter.base, tmp_path / "out", base=adapter.base)
    tool = load_script("tools/megatron_to_hf.py").main
    assert tool([str(adapter.base), str(tmp_path / "out"), "--adapter"]) == 1
    assert capsys.readouterr().err.splitlines()[-1] == f"megatron_to_hf: {message}"
    assert not (tmp_path / "out").exists()
    assert tool([str(adapter.checkpoint), str(tmp_path / "out"), "--adapter"]) == 0
    assert tool([str(adapter.checkpoint), str(tmp_path / "merged"), "--base", str(adapter.base)]) == 0
    assert (tmp_path / "out" / "adapter.safetensors").is_file() and (
        tmp_path / "merged" / "model.safetensors"
    ).is_file()


def test_an_adapter_from_before_there_were_scale_and_offset(
    save_adapter: Callable[..., Adapter], tokenizer_folder: Path, tmp_path: Path
) -> None:
    """They are 1 and 0 there."""
    saved = save_adapter()
    opened = SavedModel.open(saved.checkpoint)
    network = load_megatron(saved.checkpoint)
    state = only_decisions(model_state([network]))["model"]
    older = {"model": {name: value for name, value in state.items() if not is_buffer(name)}}
    save_checkpoint(tmp_path / "older", "final", older, opened.info, tokenizer_folder)
    for name, checkpoint in (("new", saved.checkpoint), ("old", tmp_path / "older" / "final")):
        export_adapter(checkpoint, tmp_path / name)
    assert (tmp_path / "old" / ADAPTER_FILE).read_bytes() == (tmp_path / "new" / ADAPTER_FILE).read_bytes()


@pytest.mark.parametrize(
    ("family", "change"),
    [
        ("qwen2", {"mlp_bias": False}),
        ("mistral", {"mlp_bias": False, "attention_bias": False}),
        ("qwen2", {"attention_bias": True}),  # of which transformers takes no notice
        ("llama", {"attention_dropout": 0.1}),
        ("qwen3", {"rope_parameters": {"rope_type": "default", "rope_theta": 1e4, "factor": 1.0}}),
        ("mistral", {"head_dim": None}),
    ],
    ids=lambda value: next(iter(value)) if isinstance(value, dict) else value,
)
def test_what_a_base_says_and_does_not_mean(family: str, change: dict[str, Any], tmp_path: Path) -> None:
    """A base that can be converted is the base of its adapter."""
    save_random_base(tmp_path / "hf", family=family, **({"head_dim": 8} if family == "mistral" else {}))
    path = tmp_path / "hf" / "config.json"
    values = json.loads(path.read_text()) | change
    path.write_text(json.dumps(values))
    model, _ = read_config(tmp_path / "hf")
    config_class, _ = dmc_classes(family)
    written = write_config(model, DMCConfig(), dtype=torch.float32, special_tokens={})
    _check_config("base", "adapter", values, config_class(**written))


def test_a_base_that_lacks_a_tensor(tmp_path: Path) -> None:
    save_random_base(tmp_path / "hf", family="qwen3")
    tensors = load_file(tmp_path / "hf" / "model.safetensors")
    model, _ = read_config(tmp_path / "hf")
    (tmp_path / "adapter").mkdir()
    written = write_config(model, DMCConfig(), dtype=torch.float32, special_tokens={})
    (tmp_path / "adapter" / "config.json").write_text(json.dumps(written))
    (tmp_path / "adapter" / "generation_config.json").write_text("{}")
    decisions = {
        f"model.layers.{i}.self_attn.decision.{kind}": torch.zeros(4, *shape)
        for i in range(2)
        for kind, shape in (("weight", (32,)), ("bias", ()))
    }
    save_file(decisions, tmp_path / "adapter" / ADAPTER_FILE, metadata={"format": "pt"})
    _, model_class = dmc_classes("qwen3")
    arguments = {"base": tmp_path / "hf"}
    model_class.from_pretrained(tmp_path / "adapter", **arguments)
    loaded, info = model_class.from_pretrained(tmp_path / "adapter", output_loading_info=True, **arguments)
    assert not info["missing_keys"] and loaded.name_or_path == str(tmp_path / "adapter")
    del tensors["model.layers.1.self_attn.q_norm.weight"]
    save_file(tensors, tmp_path / "hf" / "model.safetensors", metadata={"format": "pt"})
    with pytest.raises(
        ValueError, match=r"hf lacks model.layers.1.self_attn.q_norm.weight; it is damaged, or no qwen3"
    ):
        model_class.from_pretrained(tmp_path / "adapter", **arguments)


@pytest.mark.parametrize("asked", ["flash_attention_2", "flex_attention"])
def test_another_attention_is_refused_with_a_remedy(asked: str, tmp_path: Path) -> None:
    _, model_class = dmc_classes("llama")
    with pytest.raises(ValueError, match=f"attn_implementation='{asked}' is not supported: .*; leave it out"):
        model_class.from_pretrained(tmp_path, attn_implementation=asked)
