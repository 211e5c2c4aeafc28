"""Models with fewer KV heads: their means, that nothing else changes, and that they can be trained on and evaluated."""

import json
import math
import shutil
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file
from transformers import AutoModelForCausalLM, AutoTokenizer

from megatron_dmc.baselines.gqa import group_heads, mean_of_heads, rounded
from megatron_dmc.cli import main
from megatron_dmc.config import ConfigError
from megatron_dmc.convert.families import FAMILIES
from megatron_dmc.data.tokenizer import train_tokenizer
from megatron_dmc.evaluation.exported.report import is_report
from megatron_dmc.experiments.real_model.summary import read_retrofit
from tests.support.exports import dmc_model
from tests.support.llamas import TOKENS, save_random_base
from tests.support.toy import TEXT, recipe_values, write_recipe, write_text

SINGLE = "model.safetensors"


def tensors(folder: Path) -> dict[str, torch.Tensor]:
    return {name: x for file in sorted(folder.glob("*.safetensors")) for name, x in load_file(file).items()}


def logits(folder: Path) -> torch.Tensor:
    model = AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float64).eval()
    with torch.no_grad():
        return model(TOKENS).logits


@pytest.mark.parametrize("kv_heads", [1, 2])
@pytest.mark.parametrize("family", FAMILIES)
def test_heads_that_are_equal_are_their_mean(tmp_path: Path, family: str, kv_heads: int) -> None:
    """A model whose KV heads are equal within each group is the same model with one of each."""
    save_random_base(tmp_path / "base", family=family, num_attention_heads=8, num_key_value_heads=4)
    state = load_file(tmp_path / "base" / SINGLE)
    for name, x in state.items():
        if "k_proj" in name or "v_proj" in name:
            heads = x.unflatten(0, (kv_heads, 4 // kv_heads, -1))
            state[name] = heads[:, :1].expand_as(heads).flatten(0, 2).clone()
    save_file(state, tmp_path / "base" / SINGLE, {"format": "pt"})
    group_heads(tmp_path / "base", tmp_path / "gqa", kv_heads)
    before, after = logits(tmp_path / "base"), logits(tmp_path / "gqa")
    torch.testing.assert_close(after, before, rtol=0, atol=1e-12)
    assert before.std() > 0.1


@pytest.mark.parametrize("tied", [False, True])
@pytest.mark.parametrize("family", FAMILIES)
def test_what_is_written(tmp_path: Path, family: str, tied: bool) -> None:
    """Of a model in several files, in bfloat16: means of heads, each rounded once; all else as it was, to the last bit."""
    save_random_base(
        tmp_path / "base",
        max_shard_size="20KB",
        family=family,
        num_key_value_heads=4,
        tie_word_embeddings=tied,
        dtype=torch.bfloat16,
    )
    assert len(list((tmp_path / "base").glob("*.safetensors"))) > 1
    train_tokenizer(TEXT, 300, tmp_path / "base")
    written = group_heads(tmp_path / "base", tmp_path / "gqa", 2)
    before, after = tensors(tmp_path / "base"), tensors(tmp_path / "gqa")
    assert set(after) == set(before) and ("lm_head.weight" in after) != tied
    assert (written.tensors, written.bytes) == (len(after), sum(x.nbytes for x in after.values()))
    for name, x in before.items():
        if "k_proj" in name or "v_proj" in name:
            size = len(x) // 4
            means = [
                (x[2 * i * size :][:size].double() + x[(2 * i + 1) * size :][:size].double()) / 2 for i in range(2)
            ]
            x = torch.cat(means).apply_(bfloat16).to(torch.bfloat16)
        assert torch.equal(after[name], x), name
    configs = [json.loads((tmp_path / each / "config.json").read_text()) for each in ("base", "gqa")]
    assert configs[1] == configs[0] | {"num_key_value_heads": 2}
    assert AutoTokenizer.from_pretrained(tmp_path / "gqa")("the cat") == AutoTokenizer.from_pretrained(
        tmp_path / "base"
    )("the cat")


def bfloat16(exact: float) -> float:
    """The nearest number with 8 bits, of two the even one; of what is neither tiny nor huge."""
    fraction, exponent = math.frexp(exact)
    return math.ldexp(round(fraction * 256), exponent - 8)


def test_numbers_are_rounded_once() -> None:
    """Beside the middle of two, by less than float32 can say: by way of float32 these would go to the even one."""
    middle = [sign * (1 + step / 128 + 1 / 256) for sign in (1, -1) for step in range(4)]
    exact = torch.tensor([m + e for m in middle for e in (0.0, 2.0**-40, -(2.0**-40))], dtype=torch.float64)
    exact = torch.cat(
        [exact, torch.randn(1000, generator=torch.Generator().manual_seed(1)).double() / 3, exact[:3] * 0]
    )
    expected = exact.clone().apply_(bfloat16)
    assert torch.equal(rounded(exact, torch.bfloat16).double(), expected)
    assert not torch.equal(exact.to(torch.bfloat16).double(), expected)
    assert torch.equal(rounded(exact, torch.float32), exact.float())


def test_means_are_of_neighbours_in_float64() -> None:
    rows = torch.tensor([1.0, 2.0, 3.0, 2.0**-30, 5.0, 6.0, 7.0, 8.0, 9.0, 10.0, 11.0, 12.0])
    means = mean_of_heads(rows, 2, 2)
    assert means.dtype == torch.float64
    assert means.tolist() == [3, (2 + 2.0**-30 + 6) / 3, 9, 10]


def test_what_cannot_be(tmp_path: Path, capfd: pytest.CaptureFixture[str]) -> None:
    save_random_base(tmp_path / "base", num_attention_heads=12, hidden_size=96, num_key_value_heads=6)
    save_random_base(tmp_path / "one", num_key_value_heads=1)
    dmc_model({"local_window": 4}).save_pretrained(tmp_path / "export")
    (tmp_path / "there").mkdir()
    (tmp_path / "there" / "file").touch()

    def line(folder: str, output: str, heads: str) -> str:
        capfd.readouterr()
        assert main(["group-heads", str(tmp_path / folder), str(tmp_path / output), "--kv-heads", heads]) == 1
        said = capfd.readouterr().err
        assert said.count("\n") == 1
        return said

    for heads in ("4", "6", "0", "-2", "12"):
        assert f"--kv-heads {heads}: {tmp_path / 'base'} has 6 KV heads; name one of 1, 2, 3" in line(
            "base", "o", heads
        )
    assert "has 1 KV heads; there is nothing to group" in line("one", "o", "1")
    assert "is an export that merges, group-heads takes a plain model; name its base" in line("export", "o", "1")
    assert "there exists; name a folder that does not" in line("base", "there", "2")
    assert "would lie inside" in line("base", "base/gqa", "2")
    assert "config.json does not exist" in line("there", "o", "2")
    shutil.copytree(tmp_path / "base", tmp_path / "nan")
    state = load_file(tmp_path / "nan" / SINGLE)
    state["model.layers.1.self_attn.v_proj.weight"][0, 0] = math.nan
    save_file(state, tmp_path / "nan" / SINGLE, {"format": "pt"})
    assert "v_proj.weight is not finite everywhere" in line("nan", "o", "2")
    assert not (tmp_path / "o").exists() and not list(tmp_path.glob(".o*"))


def test_from_a_base_to_a_report(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capfd: Any) -> None:
    """Grouped, converted, trained, exported and measured beside the base; so is a control, with as many heads as it."""
    monkeypatch.chdir(tmp_path)
    write_text(tmp_path)
    save_random_base(tmp_path / "base", max_position_embeddings=512)
    for each in ("tokenizer.json", "tokenizer_config.json"):
        if (tmp_path / "tokenizer" / each).is_file():
            shutil.copy(tmp_path / "tokenizer" / each, "base")

    def run(*words: str) -> None:
        assert main([*words]) == 0, capfd.readouterr().err

    run("group-heads", "base", "grouped", "--kv-heads", "1")
    run("evaluate", "base", "--text", "train", "--output", "base.json", "--amount", "smoke")
    base = json.loads(Path("base.json").read_text())
    for name, folder, ratio in (("gqa", "grouped", 2), ("control", "base", 1)):
        run("convert-from-hf", folder, f"{name}-start")
        values = recipe_values(tmp_path, tmp_path / name, [{"kind": "pretrain", "steps": 3, "lr": 1e-3}])
        del values["model"]
        values["checkpoint"]["load_base"] = f"{name}-start"
        run("retrofit", str(write_recipe(tmp_path / name, values)))
        run("convert-to-hf", f"{name}/checkpoints/final", f"{name}-hf")
        run("evaluate", f"{name}-hf", "--text", "train", "--base", "base.json", "--output", f"{name}.json")
        report = json.loads(Path(f"{name}.json").read_text())
        (served,) = report["serving"]
        assert served["compression_ratio"] == served["plain_cache_bytes"] / served["cache_bytes"] == ratio
        assert report["kl"] > 0 and report["continued"][0]["kl"] > 0 and report["copying"][0]["loss"] > 0
        assert report["loss"] != base["loss"] and served["plain_tokens_per_second"] > 0
        assert is_report(report, base)
        # A summary of retrofits takes none.
        with pytest.raises(ConfigError, match=rf"{name}\.json is damaged, or no retrofit's"):
            read_retrofit(Path(f"{name}.json"), base)
