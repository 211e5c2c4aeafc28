"""The conversion tools: what they write, what they say, and that an interruption leaves nothing."""

import signal
import time
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from transformers import LlamaForCausalLM

from megatron_dmc.cli import convert_to_hf, main
from megatron_dmc.convert.from_hf import import_hf
from tests.support.processes import ROOT, run, started
from tests.support.scripts import load_script
from tests.support.texts import full_disk

TOOLS = ROOT / "tools"


def test_both_tools(save_llama: Callable[..., Path], tmp_path: Path) -> None:
    folder = save_llama()
    done = run(TOOLS / "hf_to_megatron.py", folder, tmp_path / "megatron")
    assert (done.returncode, done.stderr) == (0, "")
    done = run(
        *(TOOLS / "megatron_to_hf.py", tmp_path / "megatron", tmp_path / "hf"),
        *("--dtype", "bfloat16", "--max-shard-size", "20KB"),
    )
    assert (done.returncode, done.stderr) == (0, "")
    assert (tmp_path / "hf" / "model.safetensors.index.json").is_file()
    before, after = (LlamaForCausalLM.from_pretrained(path) for path in (folder, tmp_path / "hf"))
    assert after.dtype == torch.bfloat16
    for name, parameter in before.named_parameters():
        assert torch.equal(after.get_parameter(name), parameter.bfloat16()), name


def test_an_error_is_one_line_and_an_exit_status(tmp_path: Path) -> None:
    (tmp_path / "hf").mkdir()
    (tmp_path / "hf" / "config.json").write_text('{"model_type": "mixtral", "num_local_experts": 8}')
    done = run(TOOLS / "hf_to_megatron.py", tmp_path / "hf", tmp_path / "output")
    assert done.returncode == 1
    assert done.stderr.startswith("hf_to_megatron: ") and "mixtures of experts" in done.stderr
    assert done.stderr.count("\n") == 1
    assert not (tmp_path / "output").exists()


@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGHUP])
@pytest.mark.parametrize("tool", ["hf_to_megatron.py", "megatron_to_hf.py"])
def test_an_interrupted_conversion_leaves_nothing(
    save_llama: Callable[..., Path], tmp_path: Path, tool: str, number: signal.Signals
) -> None:
    # As large as it must be not to be whole before the signal comes.
    source = save_llama(hidden_size=256, intermediate_size=1024, num_hidden_layers=8, vocab_size=20_000)
    output = tmp_path / "output"
    if tool == "megatron_to_hf.py":
        import_hf(source, tmp_path / "source")
        source = tmp_path / "source"
    with started(TOOLS / tool, source, output) as process:
        while process.poll() is None and not list(tmp_path.glob(".output.converting-*")):
            time.sleep(0.001)
        process.send_signal(number)
        said, _ = process.communicate(timeout=60)
    assert process.returncode == 128 + number and said.endswith(": interrupted, nothing was written\n"), said
    assert not [path for path in tmp_path.iterdir() if path.name != "source"]


@pytest.mark.parametrize("size", [100, 5000], ids=["beside the weights", "weights"])
@pytest.mark.parametrize("command", ["convert-from-hf", "convert-to-hf"])
def test_a_full_disk_is_one_line_and_leaves_nothing(
    save_llama: Callable[..., Path], tmp_path: Path, capsys: pytest.CaptureFixture[str], command: str, size: int
) -> None:
    source, output = save_llama(), tmp_path / "deep" / "output"
    if command == "convert-to-hf":
        import_hf(source, tmp_path / "source")
        source = tmp_path / "source"
    capsys.readouterr()
    with full_disk(size):
        assert main([command, str(source), str(output)]) == 1
    said = capsys.readouterr().err
    assert said.startswith(
        (f"megatron-dmc: cannot write {output}: ", f"megatron-dmc: cannot save {output}/checkpoint: ")
    )
    assert "File too large" in said and said.count("\n") == 1 and str(source) not in said
    assert not list((tmp_path / "deep").iterdir())


@pytest.mark.parametrize(
    ("tool", "arguments", "message"),
    [
        ("hf_to_megatron.py", [], "hf_to_megatron: nowhere does not exist; name the folder of a Hugging Face model"),
        ("megatron_to_hf.py", [], "megatron_to_hf: checkpoint nowhere does not exist"),
        ("megatron_to_hf.py", ["--max-shard-size", "5 apples"], "5GB, 300MB"),
        ("megatron_to_hf.py", ["--max-shard-size", "0"], "5GB, 300MB"),
        ("megatron_to_hf.py", ["--dtype", "int8"], "invalid choice"),
        ("megatron_to_hf.py", ["--adapter"], "megatron_to_hf: checkpoint nowhere does not exist"),
        ("megatron_to_hf.py", ["--adapter", "--base", "there"], "--base: not allowed with argument --adapter"),
    ],
)
def test_bad_arguments(
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
    tool: str,
    arguments: list[str],
    message: str,
) -> None:
    monkeypatch.chdir(tmp_path)
    try:
        status = load_script(f"tools/{tool}").main(["nowhere", "output", *arguments])
    except SystemExit as error:
        status = error.code
    assert status != 0 and message in capsys.readouterr().err
    assert not list(tmp_path.iterdir())


@pytest.mark.parametrize(("text", "size"), [("5GB", 5 * 10**9), ("20 kb", 20_000), ("300MB", 3 * 10**8), ("7", 7)])
def test_sizes(text: str, size: int) -> None:
    assert convert_to_hf.size(text) == size
