"""A plain model with a quantized cache, against attention to keys and values that were rounded one group at a time."""

import json
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

from megatron_dmc.baselines.packed import Packed
from megatron_dmc.baselines.quantized import Quantized
from megatron_dmc.cli import main
from megatron_dmc.config import ConfigError
from megatron_dmc.data import build_indexed_dataset
from megatron_dmc.data.tokenizer import load_tokenizer, train_tokenizer
from megatron_dmc.evaluation.exported.model import load
from megatron_dmc.evaluation.exported.report import is_report
from megatron_dmc.hf.cache import CACHE_NAME
from tests.support.exports import dmc_model
from tests.support.llamas import save_random_base
from tests.support.texts import fails
from tests.support.toy import TEXT

BITS = pytest.mark.parametrize("bits", [8, 4, 2])
MORE = 12


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Models with a head dimension of 8 and of 48, a tokenizer, held-out text."""
    folder = tmp_path_factory.mktemp("quantized")
    save_random_base(folder / "base", max_position_embeddings=512)
    save_random_base(folder / "wide", family="qwen3", head_dim=48, max_position_embeddings=512)
    train_tokenizer(TEXT, 300, folder / "base")
    text = [f"{i} {one}" for i, one in enumerate(TEXT * 3)]
    build_indexed_dataset(text, load_tokenizer(folder / "base"), folder / "text")
    return folder


def naive(group: Tensor, bits: int) -> Tensor:
    """Numbers rounded to the nearest of 2^bits, evenly from the least to the largest."""
    low = float(group.min())
    step = (float(group.max()) - low) / (2**bits - 1)
    return torch.tensor([low + round((x - low) / step) * step for x in group.tolist()])


def rounded(keys: Tensor, values: Tensor, bits: int, group: int) -> tuple[Tensor, Tensor]:
    """Of a context, [1, kv_heads, tokens, head_dim]: groups of a channel's 32 tokens; of ``group`` channels of a token."""
    keys, values = keys.clone(), values.clone()
    for head in range(keys.shape[1]):
        for begin in range(0, keys.shape[2] - 31, 32):
            for channel in range(keys.shape[3]):
                keys[0, head, begin : begin + 32, channel] = naive(keys[0, head, begin : begin + 32, channel], bits)
            for token in range(begin, begin + 32):
                for first in range(0, keys.shape[3], group):
                    part = values[0, head, token, first : first + group]
                    part.copy_(naive(part, bits))
    return keys, values


@BITS
@pytest.mark.parametrize(("name", "group"), [("base", 8), ("wide", 16)])
@pytest.mark.parametrize("context", [20, 64, 75])
def test_what_follows_attends_to_rounded_numbers(folder: Path, bits: int, name: str, group: int, context: int) -> None:
    method, model = Quantized(bits), load(folder / name, torch.float32)
    text = torch.randint(3, 300, (context + MORE,), generator=torch.Generator().manual_seed(3))
    with torch.inference_mode():
        plain = model(text[None, :context], use_cache=True)
        whole = plain[CACHE_NAME]
        for layer in whole.layers:
            layer.keys, layer.values = rounded(layer.keys, layer.values, bits, group)
        expected = model(text[None, context:], use_cache=True, **{CACHE_NAME: whole}).logits[0]
        first, kept = method.read(model, text[:context])
        # In pieces, as a question and its answer come.
        some, kept = method.extend(model, text[context:-5], kept)
        more, kept = method.extend(model, text[-5:], kept)
        unrounded = model(text[None]).logits[0, context:]
    torch.testing.assert_close(first[-1], plain.logits[0, -1], rtol=0, atol=1e-5)
    torch.testing.assert_close(torch.cat([some, more]), expected, rtol=0, atol=2e-4)
    assert kept.tokens == kept.cache.get_seq_length() == context + MORE and method.slots(model, kept) is None
    if context < 32:
        assert torch.allclose(unrounded, expected, atol=1e-4)
    elif bits < 8:
        assert not torch.allclose(unrounded, expected, atol=1e-2)


@BITS
def test_bytes_are_those_of_codes_and_scales(folder: Path, bits: int) -> None:
    """In bfloat16: of 200 tokens 8 are whole. Keys have a pair of scales for 32 tokens, values for a head's 8 channels."""
    method, model = Quantized(bits), load(folder / "base", torch.bfloat16)
    _, kept = method.read(model, torch.arange(3, 203))
    codes, keys, values = 192 * 8 * bits // 8, 192 * 8 // 32 * 4, 192 * 4
    assert method.nbytes(model, kept) == 2 * 2 * (2 * codes + keys + values + 2 * 8 * 8 * 2)
    held = [x for layer in kept.cache.layers for packed in (layer._keys, layer._values) for x in packed[:3]]
    held += [x for layer in kept.cache.layers for x in (layer.keys, layer.values)]
    # No view of anything that is larger.
    assert sum(x.untyped_storage().nbytes() for x in held) == method.nbytes(model, kept)


@BITS
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_numbers_that_are_few(bits: int, dtype: torch.dtype) -> None:
    """The ends of a group come back; numbers that are all equal, too, and as many as there are codes."""
    step = 2.0 ** (3 - bits)
    numbers = torch.arange(2**bits, dtype=dtype) * step - 1
    groups = torch.stack([numbers, torch.full_like(numbers, -2.5), torch.zeros_like(numbers)]).repeat_interleave(8, 1)
    packed = Packed.of(groups, bits, groups.shape[1])
    assert torch.equal(packed.numbers(), groups)
    assert packed.codes.numel() == groups.numel() * bits // 8


def test_the_command(folder: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capfd: Any) -> None:
    monkeypatch.chdir(folder)
    base = tmp_path / "base.json"
    assert main(["evaluate", "base", "--text", "text", "--output", str(base), "--amount", "smoke"]) == 0
    found = {}
    for bits in (8, 2):
        report = tmp_path / f"{bits}.json"
        words = ["evaluate", "base", "--text", "text", "--base", str(base), "--output", str(report)]
        assert main([*words, "--baseline", "quantized", "--bits", str(bits)]) == 0, capfd.readouterr().err
        found[bits] = json.loads(report.read_text())
        assert found[bits]["baseline"] == {"bits": bits, "group": 32} and "loss" not in found[bits]
        assert is_report(found[bits], json.loads(base.read_text()))
        (served,) = found[bits]["serving"]
        assert served["compression_ratio"] == served["plain_cache_bytes"] / served["cache_bytes"] > 1
    assert 0 < found[8]["continued"][0]["kl"] < 1e-3 < found[2]["continued"][0]["kl"]


@pytest.mark.parametrize(
    ("words", "line"),
    [
        (["--baseline", "quantized"], "--baseline quantized needs the bits of a number; add --bits 4"),
        (
            ["--baseline", "quantized", "--compression-ratio", "4"],
            "--compression-ratio has no effect with --baseline quantized; leave it out",
        ),
        (
            ["--baseline", "quantized", "--bits", "4", "--merge-threshold", "1"],
            "--merge-threshold has no effect with --baseline quantized; leave it out",
        ),
        (
            ["--baseline", "snapkv", "--compression-ratio", "4", "--bits", "4"],
            "--bits has no effect with --baseline snapkv; leave it out",
        ),
        (["--bits", "4"], "--bits has no effect without --baseline quantized; leave it out"),
    ],
)
def test_flags_that_do_not_fit(words: list[str], line: str, capfd: pytest.CaptureFixture[str]) -> None:
    assert main(["evaluate", "m", "--text", "t", "--base", "b.json", "--output", "o.json", *words]) == 1
    said = capfd.readouterr().err
    assert line in said and said.count("\n") == 1


def test_models_that_it_cannot_take(tmp_path: Path) -> None:
    dmc_model({"local_window": 4}).save_pretrained(tmp_path / "export")
    save_random_base(tmp_path / "narrow", family="mistral", head_dim=12)
    with pytest.raises(ConfigError, match=r"--baseline quantized takes a plain model, .* is an export that merges"):
        Quantized(4).check(str(tmp_path / "export"), 100)
    fails("narrow has a head dimension of 12, which does not fill bytes", Quantized(4).check, tmp_path / "narrow", 100)
