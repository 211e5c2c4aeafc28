"""safetensors files: what is written is read back, damaged ones are refused in one line."""

import json
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file

from megatron_dmc.config import ConfigError
from megatron_dmc.convert.weights import INDEX_FILE, Weights, write_weights

TENSORS = {f"layer.{i}": torch.arange(6.0).reshape(2, 3) + i for i in range(5)}
SHAPES = {name: tuple(tensor.shape) for name, tensor in TENSORS.items()}


@pytest.fixture
def sharded(tmp_path: Path) -> Path:
    """Two tensors of 24 bytes to a file: 3 files."""
    write_weights(tmp_path, SHAPES, TENSORS.items(), dtype=torch.float32, max_shard_size=50)
    return tmp_path


def test_shards_hold_no_more_than_they_may(sharded: Path) -> None:
    files = sorted(sharded.glob("*.safetensors"))
    assert [path.name for path in files] == [f"model-0000{i}-of-00003.safetensors" for i in (1, 2, 3)]
    assert [len(load_file(path)) for path in files] == [2, 2, 1]
    index = json.loads((sharded / INDEX_FILE).read_text())
    assert index["metadata"] == {"total_size": 120}
    assert {name: load_file(sharded / file)[name].tolist() for name, file in index["weight_map"].items()} == {
        name: tensor.tolist() for name, tensor in TENSORS.items()
    }


@pytest.mark.parametrize("limit", [1, 10**9])
@pytest.mark.parametrize("dtype", [torch.float32, torch.float16, torch.bfloat16])
def test_what_is_written_is_read(tmp_path: Path, limit: int, dtype: torch.dtype) -> None:
    write_weights(tmp_path, SHAPES, TENSORS.items(), dtype=dtype, max_shard_size=limit)
    assert len(list(tmp_path.glob("*.safetensors"))) == (1 if limit == 10**9 else 5)
    weights = Weights(tmp_path)
    assert (weights.shapes, weights.dtype) == (SHAPES, dtype)
    weights.check(SHAPES.items())
    for name, tensor in TENSORS.items():
        assert torch.equal(weights[name], tensor.to(dtype))


def test_views_of_one_tensor_are_written(tmp_path: Path) -> None:
    whole = torch.randn(4, 3)
    parts = {"gate": whole[:2], "up": whole[2:]}
    write_weights(tmp_path, {"gate": (2, 3), "up": (2, 3)}, parts.items(), dtype=torch.float32, max_shard_size=10**9)
    assert torch.equal(torch.cat([Weights(tmp_path)[name] for name in ("gate", "up")]), whole)


def test_mixed_dtypes_are_read_in_one_that_holds_all(tmp_path: Path) -> None:
    save_file({"a": torch.ones(2, dtype=torch.bfloat16), "b": torch.ones(2, dtype=torch.float16)}, tmp_path / "x")
    (tmp_path / "x").rename(tmp_path / "model.safetensors")
    assert Weights(tmp_path).dtype == torch.float32


def expect(folder: Path, message: str) -> None:
    with pytest.raises(ConfigError) as error:
        Weights(folder).check(SHAPES.items())
    assert message in str(error.value) and "\n" not in str(error.value)


def test_a_missing_shard(sharded: Path) -> None:
    (sharded / "model-00002-of-00003.safetensors").unlink()
    expect(sharded, "model-00002-of-00003.safetensors is missing")


@pytest.mark.parametrize("keep", [0, 5, 60, -1])
def test_a_truncated_shard(sharded: Path, keep: int) -> None:
    path = sharded / "model-00002-of-00003.safetensors"
    path.write_bytes(path.read_bytes()[:keep])
    expect(sharded, "model-00002-of-00003.safetensors cannot be read as safetensors")


def test_a_shard_of_another_model(sharded: Path) -> None:
    save_file({"other": torch.ones(1)}, sharded / "model-00003-of-00003.safetensors")
    expect(sharded, "does not hold layer.4")


@pytest.mark.parametrize("file", ["../model.safetensors", "/etc/passwd", "weights.bin", 3, None])
def test_an_index_that_leads_elsewhere(sharded: Path, file: object) -> None:
    (sharded / INDEX_FILE).write_text(json.dumps({"weight_map": {"layer.0": file}}))
    expect(sharded, "is not the name of a safetensors file in the folder")


@pytest.mark.parametrize("content", ["", "[]", "{}", '{"weight_map": []}', '{"weight_map": {}}'])
def test_a_damaged_index(sharded: Path, content: str) -> None:
    (sharded / INDEX_FILE).write_text(content)
    expect(sharded, INDEX_FILE)


@pytest.mark.parametrize("name", ["pytorch_model.bin", "consolidated.00.pth"])
def test_pickles_are_not_read(tmp_path: Path, name: str) -> None:
    torch.save(TENSORS, tmp_path / name)
    expect(tmp_path, "convert to safetensors")


def test_no_weights(tmp_path: Path) -> None:
    expect(tmp_path, "holds neither model.safetensors nor")


def test_integer_weights(tmp_path: Path) -> None:
    save_file({"layer.0": torch.ones(2, dtype=torch.int8)}, tmp_path / "model.safetensors")
    expect(tmp_path, "layer.0 is I8; only")


def save(folder: Path, tensors: dict[str, torch.Tensor]) -> None:
    save_file(tensors, folder / "model.safetensors")


def test_tensors_that_do_not_fit_the_model(tmp_path: Path) -> None:
    save(tmp_path, TENSORS | {"layer.1": torch.ones(3, 2)})
    expect(tmp_path, "layer.1 has shape [3, 2], config.json asks for [2, 3]")
    save(tmp_path, TENSORS | {"bias": torch.ones(1)})
    expect(tmp_path, "in the weights, but not in the model: bias")
    save(tmp_path, {"layer.0": TENSORS["layer.0"]})
    expect(tmp_path, "missing from the weights: layer.1, layer.2, layer.3, and more")


def test_endless_layers_are_refused_at_once(tmp_path: Path) -> None:
    save(tmp_path, TENSORS)
    with pytest.raises(ConfigError, match=r"missing from the weights: more\.0"):
        Weights(tmp_path).check((f"more.{i}", (1,)) for i in range(10**12))


def test_tied_weights_saved_twice(tmp_path: Path) -> None:
    save(tmp_path, {"embedding": torch.ones(2, 2), "head": torch.ones(2, 2), "other": torch.zeros(2, 2)})
    weights = Weights(tmp_path)
    weights.drop_copy("head", "embedding")
    assert set(weights.shapes) == {"embedding", "other"}
    with pytest.raises(ConfigError, match="other differs from embedding"):
        weights.drop_copy("other", "embedding")
