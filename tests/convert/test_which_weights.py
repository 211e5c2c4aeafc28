"""Folders with more than one set of weights: those are taken that transformers loads, or the folder is refused."""

import json
import shutil
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file
from transformers import LlamaForCausalLM

from megatron_dmc.config import ConfigError
from megatron_dmc.convert.from_hf import import_hf
from megatron_dmc.convert.to_hf import export_hf
from megatron_dmc.convert.weights import Weights
from megatron_dmc.hf.adapter import _tensors

INDEX = "model.safetensors.index.json"


@pytest.fixture
def old(save_llama: Callable[..., Path]) -> Path:
    """Several shards and their index."""
    return save_llama(seed=0, max_shard_size="40KB")


@pytest.fixture
def new(save_llama: Callable[..., Path]) -> Path:
    """One file."""
    return save_llama(seed=1)


def assert_as_transformers(folder: Path, tmp_path: Path) -> None:
    """The conversion, there and back, and an adapter's base take the weights that transformers takes."""
    expected = LlamaForCausalLM.from_pretrained(folder).state_dict()
    import_hf(folder, tmp_path / "megatron")
    export_hf(tmp_path / "megatron", tmp_path / "back")
    found = load_file(tmp_path / "back" / "model.safetensors")
    assert found.keys() == expected.keys()
    for name, tensor in expected.items():
        assert torch.equal(found[name], tensor), name
    # transformers then loads all that these files hold
    base = [load_file(file) for file in set(_tensors(str(folder)).values())]
    assert sum(map(len, base)) == len(expected)
    assert all(torch.equal(tensor, expected[name]) for part in base for name, tensor in part.items())


def test_one_file_goes_before_an_index(old: Path, new: Path, tmp_path: Path) -> None:
    shutil.copy(new / "model.safetensors", old)
    assert_as_transformers(old, tmp_path)
    (old / INDEX).write_text("damaged, and not read")
    Weights(old)


def test_shards_that_the_index_does_not_name(old: Path, new: Path, tmp_path: Path) -> None:
    for name in ("model-00001-of-00009.safetensors", "model.fp16.safetensors", "consolidated.safetensors"):
        shutil.copy(new / "model.safetensors", old / name)
    (old / "original").mkdir()
    shutil.copy(new / "model.safetensors", old / "original")
    (old / "pytorch_model.bin").write_bytes(b"a pickle")
    (old / "adapter_model.safetensors").write_bytes(b"of an adapter that has no configuration here")
    assert_as_transformers(old, tmp_path)


def test_a_tensor_that_the_index_does_not_name(old: Path, tmp_path: Path) -> None:
    """transformers loads all that a file of the index holds."""
    index = json.loads((old / INDEX).read_text())
    del index["weight_map"]["model.norm.weight"]
    (old / INDEX).write_text(json.dumps(index))
    assert_as_transformers(old, tmp_path)


def test_a_tensor_in_two_shards_is_refused(old: Path, new: Path, tmp_path: Path) -> None:
    """transformers takes the last file's without a word: a mixture of two models."""
    index = json.loads((old / INDEX).read_text())["weight_map"]
    name = "model.norm.weight"
    other = next(file for file in sorted(set(index.values())) if file != index[name])
    save_file(load_file(old / other) | {name: load_file(new / "model.safetensors")[name]}, old / other)
    with pytest.raises(
        ConfigError, match=f"both hold {name}; they were saved by different runs: fetch the folder again"
    ):
        import_hf(old, tmp_path / "megatron")


@pytest.mark.parametrize("name", ["model.fp16.safetensors", "consolidated.safetensors", "original/model.safetensors"])
def test_weights_by_another_name_are_named(new: Path, tmp_path: Path, name: str) -> None:
    (new / name).parent.mkdir(exist_ok=True)
    (new / "model.safetensors").rename(new / name)
    with pytest.raises(OSError):
        LlamaForCausalLM.from_pretrained(new)
    with pytest.raises(ConfigError, match=f"holds neither model.safetensors nor {INDEX}; {name}, which it holds"):
        import_hf(new, tmp_path / "megatron")


def test_weights_that_the_configuration_names_are_refused(old: Path, new: Path, tmp_path: Path) -> None:
    shutil.copy(old / "config.json", new)
    config = json.loads((new / "config.json").read_text())
    (new / "config.json").write_text(json.dumps(config | {"transformers_weights": "other.safetensors"}))
    with pytest.raises(
        ConfigError, match=r"config\.json: transformers_weights 'other\.safetensors': weights under a name"
    ):
        import_hf(new, tmp_path / "megatron")


def test_shards_of_a_distributed_save_are_refused(new: Path, tmp_path: Path) -> None:
    shutil.copy(new / "model.safetensors", new / "shard-00000-model-00001-of-00002.safetensors")
    with pytest.raises(ConfigError, match=r"one file per process \(shard-00000-model-00001-of-00002\.safetensors\)"):
        import_hf(new, tmp_path / "megatron")


def test_a_peft_adapter_beside_the_weights_is_refused(new: Path, tmp_path: Path) -> None:
    """With PEFT installed transformers would add it, without PEFT it would not."""
    (new / "adapter_config.json").write_text("{}")
    with pytest.raises(ConfigError, match=r"holds a PEFT adapter \(adapter_config\.json\).*merge_and_unload"):
        import_hf(new, tmp_path / "megatron")
    with pytest.raises(ValueError, match=r"holds a PEFT adapter \(adapter_config\.json\).*merge_and_unload"):
        _tensors(str(new))
