"""Conversions pass weights one after the other: memory, what is written, what is checked, what is shown."""

import json
import os
import pty
import sys
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from safetensors.torch import save_file

from megatron_dmc.checkpoint import CheckpointError, SavedModel, save_checkpoint
from megatron_dmc.checkpoint.weights import model_state
from megatron_dmc.cli import main
from megatron_dmc.config import ConfigError
from megatron_dmc.convert import safetensors_file
from megatron_dmc.convert.from_hf import import_hf
from megatron_dmc.convert.progress import progress
from megatron_dmc.convert.safetensors_file import DTYPES, is_finite, places, write_file
from megatron_dmc.convert.to_hf import export_hf
from tests.support.llamas import load_megatron
from tests.support.processes import ROOT, run
from tests.support.tensors import assert_same_tensors, checkpoint_tensors
from tests.support.terminal import read_to_end

# The whole is 20 times the largest parameter, which is the size of the bound without its constant.
SIZES = [
    *("--layers", "12", "--hidden", "1024", "--ffn", "2816", "--heads", "16", "--kv-heads", "4", "--vocab", "2048"),
    *("--allowed", "60000000"),
]


def test_memory_is_that_of_the_largest_parameter_not_of_the_model(tmp_path: Path) -> None:
    done = run("-W", "ignore", ROOT / "benchmarks/conversion_memory.py", tmp_path, *SIZES, "--json")
    assert done.returncode == 0, done.stdout + done.stderr
    found = json.loads(done.stdout)
    assert found["same"] and found["bytes"] > 3 * found["bound"]
    assert all(0 < each["peak"] <= found["bound"] for each in found["conversions"].values())
    assert not list(tmp_path.iterdir())


@pytest.mark.parametrize("tied", [False, True], ids=["untied", "tied"])
@pytest.mark.parametrize("multiple", [1, 64], ids=["plain", "padded"])
def test_what_streams_is_what_a_whole_model_writes(
    save_llama: Callable[..., Path], tmp_path: Path, tied: bool, multiple: int
) -> None:
    folder = save_llama(tie_word_embeddings=tied, num_hidden_layers=3, dtype=torch.bfloat16)
    written = import_hf(folder, tmp_path / "streamed", pad_vocab_to_multiple_of=multiple)
    info = SavedModel.open(tmp_path / "streamed").info
    network = load_megatron(tmp_path / "streamed", torch.bfloat16)
    whole = save_checkpoint(tmp_path, "whole", model_state([network]), info)
    for name in ("dmc.json", "metadata.json", "common.pt", "__0_0.distcp"):
        assert (tmp_path / "streamed" / name).read_bytes() == (whole / name).read_bytes(), name
    assert_same_tensors(checkpoint_tensors(tmp_path / "streamed"), checkpoint_tensors(whole))
    parameters = dict(network.named_parameters())
    assert (written.tensors, written.bytes) == (len(parameters), sum(p.nbytes for p in parameters.values()))


@pytest.mark.parametrize("value", [float("nan"), float("inf")])
def test_a_diverged_run_is_not_exported(save_llama: Callable[..., Path], tmp_path: Path, value: float) -> None:
    import_hf(save_llama(), tmp_path / "base")
    info = SavedModel.open(tmp_path / "base").info
    network = load_megatron(tmp_path / "base")
    with torch.no_grad():
        network.decoder.layers[1].mlp.linear_fc2.weight[3, 4] = value
    diverged = save_checkpoint(tmp_path, "diverged", model_state([network]), info)
    with pytest.raises(CheckpointError) as error:
        export_hf(diverged, tmp_path / "hf")
    assert str(error.value) == (
        f"{diverged}: decoder.layers.1.mlp.linear_fc2.weight is not finite everywhere; its run has diverged, name an earlier "
        "checkpoint"
    )
    assert sorted(path.name for path in tmp_path.iterdir()) == ["base", "diverged"]


def test_an_element_that_is_not_finite_is_found_in_any_piece(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(safetensors_file, "_PIECE", 4)
    for place in range(10):
        tensor = torch.zeros(2, 5)
        assert is_finite(tensor)
        tensor.view(-1)[place] = float("-inf")
        assert not is_finite(tensor)


def test_a_file_that_becomes_shorter_while_it_is_read(tmp_path: Path) -> None:
    path = tmp_path / "model.safetensors"
    write_file(path, {"a": (2, 3)}, iter([("a", torch.ones(2, 3))]), torch.float32)
    found = places(path)
    os.truncate(path, path.stat().st_size - 1)
    with pytest.raises(ConfigError, match=r"model.safetensors has become shorter while it was read; fetch it again$"):
        found["a"].read()
    with pytest.raises(ConfigError, match="cannot be read as safetensors"):
        places(path)


def test_one_line_says_what_was_checked(
    save_llama: Callable[..., Path], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    folder = save_llama(num_hidden_layers=1)
    capsys.readouterr()
    for command, source, output, tensors in (
        ("convert-from-hf", folder, tmp_path / "base", 9),
        ("convert-to-hf", tmp_path / "base", tmp_path / "hf", 12),
    ):
        assert main([command, str(source), str(output)]) == 0
        said, errors = capsys.readouterr()
        # No bar: standard error is no terminal.
        assert not errors and said.count("\n") == 1
        # Two vocabularies of 300, attention (4 + 2 + 2 + 4 heads of 8), MLP, norms; hidden size 32, float32.
        size = 4 * 32 * (2 * 300 + 12 * 8 + 3 * 48 + 3) / 1000
        assert said == (
            f"{output}: converted from {source}; {tensors} tensors, {size:.1f} kB; names, shapes and sizes checked, all "
            "values finite\n"
        )


def test_a_terminal_sees_bytes_and_bytes_per_second(monkeypatch: pytest.MonkeyPatch) -> None:
    reader, writer = pty.openpty()
    with os.fdopen(writer, "w") as stream:
        monkeypatch.setattr(sys, "stderr", stream)
        monkeypatch.setenv("TERM", "xterm")
        monkeypatch.setenv("COLUMNS", "120")
        with progress("writing x[y]", 2_000_000) as advance:
            advance(500_000)
            advance(1_500_000)
    seen = read_to_end(reader)
    for part in ("writing x[y]", "2.0/2.0 MB", "/s"):
        assert part in seen


@pytest.mark.parametrize("dtype", DTYPES.values(), ids=str)
def test_a_file_is_the_librarys_byte_by_byte(dtype: torch.dtype, tmp_path: Path) -> None:
    names = ["model.layers.10.b", "model.layers.2.a", "lm_head.weight", "z", "A", 'with "quotes"', "é"]
    shapes = {name: (i, 3)[: i % 3] for i, name in enumerate(names)}
    tensors = {name: torch.randn(shape).to(dtype) for name, shape in shapes.items()}
    write_file(tmp_path / "ours", shapes, iter(tensors.items()), dtype)
    save_file(tensors, tmp_path / "theirs", metadata={"format": "pt"})
    assert (tmp_path / "ours").read_bytes() == (tmp_path / "theirs").read_bytes()
