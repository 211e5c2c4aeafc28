"""kvpress' methods on a plain model, against attention in which what they dropped is masked. Needs make kvpress."""

import importlib.util
import json
from math import ceil
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor
from transformers import LlamaForCausalLM

from megatron_dmc.baselines import piecewise
from megatron_dmc.baselines.piecewise import PIECE, PiecewisePress
from megatron_dmc.baselines.press import Press
from megatron_dmc.baselines.presses import PIECEWISE, PRESSES
from megatron_dmc.cli import main
from megatron_dmc.config import ConfigError
from megatron_dmc.data import build_indexed_dataset
from megatron_dmc.data.tokenizer import load_tokenizer, train_tokenizer
from megatron_dmc.evaluation.exported.model import load
from megatron_dmc.evaluation.exported.recall import recalls
from megatron_dmc.evaluation.exported.report import is_report
from megatron_dmc.evaluation.recall_tasks import Sample
from tests.support.exports import dmc_model
from tests.support.llamas import save_random_base
from tests.support.toy import TEXT

HAS_KVPRESS = importlib.util.find_spec("kvpress") is not None
needs_kvpress = pytest.mark.skipif(
    not HAS_KVPRESS, reason="no kvpress here: make kvpress, then PYTHONPATH=.venv-kvpress pytest tests/baselines"
)
NAMES = pytest.mark.parametrize("name", PRESSES)
CONTEXT, MORE = 200, 12
PIECEWISE_NAMES = pytest.mark.parametrize("name", PIECEWISE)
LENGTH = 3 * PIECE + 17


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A Llama of one layer, so that a mask can say what it has dropped, and one of two; a tokenizer; held-out text."""
    folder = tmp_path_factory.mktemp("baselines")
    for name, layers in (("one", 1), ("base", 2)):
        save_random_base(folder / name, num_hidden_layers=layers, max_position_embeddings=512)
        train_tokenizer(TEXT, 300, folder / name)
    build_indexed_dataset(
        [f"{i} {one}" for i, one in enumerate(TEXT * 3)], load_tokenizer(folder / "base"), folder / "text"
    )
    return folder


def tokens(count: int) -> Tensor:
    return torch.randint(3, 300, (count,), generator=torch.Generator().manual_seed(3))


@needs_kvpress
@NAMES
def test_nothing_is_dropped_at_a_ratio_of_one(folder: Path, name: str) -> None:
    press = Press(1.0, name)
    model = load(folder / "base", torch.float32, press.attention)
    text = tokens(CONTEXT + MORE)
    with torch.inference_mode():
        expected = model(text[None]).logits[0, CONTEXT - 1 :]
        logits, kept = press.read(model, text[:CONTEXT])
        more, kept = press.extend(model, text[CONTEXT:], kept)
    torch.testing.assert_close(torch.cat([logits, more]), expected, rtol=0, atol=1e-4)
    assert press.slots(model, kept).tolist() == [[CONTEXT + MORE] * 2] * 2
    assert press.nbytes(model, kept) == 2 * 2 * 2 * (CONTEXT + MORE) * 8 * 4


@needs_kvpress
@NAMES
@pytest.mark.parametrize("ratio", [2.0, 7.0])
def test_what_is_dropped_is_not_attended_to(folder: Path, name: str, ratio: float) -> None:
    press = Press(ratio, name)
    model = load(folder / "one", torch.float32, press.attention)
    text = tokens(CONTEXT + MORE)
    with torch.inference_mode():
        whole = model(text[None, :CONTEXT], use_cache=True).past_key_values.layers[0].keys[0]
        logits, kept = press.read(model, text[:CONTEXT])
        slots = press.slots(model, kept)
        assert CONTEXT / ratio - 2 < slots.double().mean() <= CONTEXT / ratio + 2
        visible = (whole[:, :, None] == kept.cache.layers[0].keys[0][:, None]).all(-1).any(-1)
        if (hidden := model.model.layers[0].self_attn.hidden) is not None:
            visible &= ~hidden
        assert visible.sum(1).tolist() == slots[0].tolist()
        more, _ = press.extend(model, text[CONTEXT:], kept)
        mask = torch.ones(CONTEXT + MORE, CONTEXT + MORE).tril().bool().repeat(4, 1, 1)
        mask[:, CONTEXT:, :CONTEXT] = visible.repeat_interleave(2, dim=0)[:, None]
        plain = LlamaForCausalLM.from_pretrained(folder / "one")
        expected = plain(text[None], attention_mask=mask[None]).logits[0, CONTEXT - 1 :]
    torch.testing.assert_close(torch.cat([logits, more]), expected, rtol=0, atol=1e-4)
    assert not torch.allclose(plain(text[None]).logits[0, CONTEXT:], more, atol=1e-2)


@needs_kvpress
def test_each_text_is_compressed_anew(folder: Path) -> None:
    """What a press has hidden in one text is not hidden in the next."""
    press = Press(4.0, "adakv_expected_attention")
    model = load(folder / "base", torch.float32, press.attention)
    first, second = tokens(CONTEXT), tokens(2 * CONTEXT)[CONTEXT:]
    alone = press.read(load(folder / "base", torch.float32, press.attention), second)
    press.read(model, first)
    again = press.read(model, second)
    assert torch.equal(alone[0], again[0]) and press.slots(model, again[1]).sum() == 2 * 2 * CONTEXT // 4


@needs_kvpress
def test_the_question_is_read_after_the_context_was_compressed(folder: Path) -> None:
    press = Press(4.0, "snapkv")
    model = load(folder / "base", torch.float32, press.attention)
    prompt, question = tokens(CONTEXT), 9
    logits, kept = press.read(model, prompt[:-question])
    logits, kept = press.extend(model, prompt[-question:], kept)
    answer = [int(logits[-1].argmax())]
    for _ in range(2):
        logits, kept = press.extend(model, torch.tensor(answer[-1:]), kept)
        answer.append(int(logits[-1].argmax()))
    assert recalls(model, Sample(prompt.tolist(), answer, 0, question), press)
    wrong = [*answer[:2], (answer[2] + 1) % 300]
    assert not recalls(model, Sample(prompt.tolist(), wrong, 0, question), press)


@needs_kvpress
@pytest.mark.parametrize("name", ["h2o", "adakv_expected_attention", "kvzip"])
def test_the_command(
    folder: Path, tmp_path: Path, name: str, monkeypatch: pytest.MonkeyPatch, capfd: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.chdir(folder)
    base, report = tmp_path / "base.json", tmp_path / f"{name}.json"
    assert main(["evaluate", "base", "--text", "text", "--output", str(base), "--amount", "smoke"]) == 0
    words = ["evaluate", "base", "--text", "text", "--base", str(base), "--output", str(report), "--baseline", name]
    assert main([*words, "--compression-ratio", "4"]) == 0, capfd.readouterr().err
    found = json.loads(report.read_text())
    assert found["baseline"] == {"compression_ratio": 4.0, "press": name} and "loss" not in found
    assert is_report(found, json.loads(base.read_text())) and not is_report(found)
    (served,) = found["serving"]
    assert served["compression_ratio"] == pytest.approx(4, rel=0.02)
    assert served["cache_bytes"] == pytest.approx(served["plain_cache_bytes"] / 4, rel=0.02)
    (continued,) = found["continued"]
    assert continued["kl"] > 1e-3 and continued["tokens"] == 256
    assert "after a context" in capfd.readouterr().out


@pytest.mark.parametrize(
    ("words", "line"),
    [
        (
            ["--baseline", "nothing", "--compression-ratio", "4"],
            "--baseline nothing: there is none of that name; name one of",
        ),
        (["--baseline", "snapkv"], "--baseline needs a ratio to compress to; add --compression-ratio 4"),
        (["--baseline", "snapkv", "--compression-ratio", "1"], "--baseline needs a ratio to compress to"),
    ],
)
def test_what_cannot_be(
    folder: Path,
    tmp_path: Path,
    words: list[str],
    line: str,
    monkeypatch: pytest.MonkeyPatch,
    capfd: pytest.CaptureFixture[str],
) -> None:
    monkeypatch.chdir(folder)
    base = str(tmp_path / "base.json")
    assert main(["evaluate", "base", "--text", "text", "--output", base, "--amount", "smoke"]) == 0
    capfd.readouterr()
    given = ["evaluate", "base", "--text", "text", "--base", base, "--output", str(tmp_path / "out.json"), *words]
    assert main(given) == 1
    said = capfd.readouterr().err
    assert line in said and said.count("\n") == 1
    assert not (tmp_path / "out.json").exists()


@needs_kvpress
def test_beside_another_models_report(
    folder: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capfd: Any
) -> None:
    monkeypatch.chdir(folder)
    base = str(tmp_path / "base.json")
    assert main(["evaluate", "base", "--text", "text", "--output", base, "--amount", "smoke"]) == 0
    save_random_base(tmp_path / "other", seed=5, num_hidden_layers=2, max_position_embeddings=512)
    train_tokenizer(TEXT, 300, tmp_path / "other")
    words = [
        "evaluate",
        str(tmp_path / "other"),
        "--text",
        "text",
        "--base",
        base,
        "--output",
        str(tmp_path / "out.json"),
    ]
    assert main([*words, "--baseline", "snapkv", "--compression-ratio", "4"]) == 1
    assert "was measured on another model than" in capfd.readouterr().err


def test_without_its_base(folder: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capfd: Any) -> None:
    monkeypatch.chdir(folder)
    words = ["evaluate", "base", "--text", "text", "--output", str(tmp_path / "out.json"), "--baseline", "snapkv"]
    assert main([*words, "--compression-ratio", "4"]) == 1
    assert "evaluate the model without it first, and name that report with --base" in capfd.readouterr().err


@needs_kvpress
def test_models_and_budgets_that_it_cannot_take(folder: Path, tmp_path: Path) -> None:
    dmc_model({"local_window": 4}, vocab_size=300).save_pretrained(tmp_path / "export")
    with pytest.raises(
        ConfigError, match=r"--baseline snapkv takes a plain model, .* is an export that merges; name its base"
    ):
        Press(4.0, "snapkv").check(str(tmp_path / "export"), 100)
    with pytest.raises(ConfigError, match="keeps less than one of 100 tokens; ask for less"):
        Press(101.0, "snapkv").check(str(folder / "base"), 100)
    Press(4.0, "snapkv").check(str(folder / "base"), 100)


@pytest.mark.skipif(HAS_KVPRESS, reason="it is here")
def test_without_kvpress(folder: Path) -> None:
    with pytest.raises(ConfigError, match=r"--baseline snapkv needs kvpress, .* or use the one of make kvpress"):
        Press(4.0, "snapkv").check(str(folder / "base"), 100)


@needs_kvpress
@PIECEWISE_NAMES
def test_nothing_is_dropped_in_pieces_at_a_ratio_of_one(folder: Path, name: str) -> None:
    press = PiecewisePress(1.0, name)
    model, text = load(folder / "base", torch.float32, press.attention), tokens(LENGTH)
    with torch.inference_mode():
        torch.testing.assert_close(press.whole(model, text), model(text[None]).logits[0], rtol=0, atol=1e-4)
        logits, kept = press.read(model, text[:-5])
        more, kept = press.extend(model, text[-5:], kept)
        torch.testing.assert_close(torch.cat([logits, more]), model(text[None]).logits[0, -6:], rtol=0, atol=1e-4)
    assert press.slots(model, kept).tolist() == [[LENGTH] * 2] * 2


@needs_kvpress
@PIECEWISE_NAMES
@pytest.mark.parametrize("ratio", [2.0, 5.0])
def test_what_was_dropped_in_pieces_is_not_attended_to(
    folder: Path,
    name: str,
    ratio: float,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    press, text = PiecewisePress(ratio, name), tokens(LENGTH)
    model = load(folder / "one", torch.float32, press.attention)
    with torch.inference_mode():
        whole = model(text[None], use_cache=True).past_key_values.layers[0].keys[0]
    mask, extend, sizes = torch.ones(LENGTH, LENGTH).tril().bool().repeat(4, 1, 1), PiecewisePress.extend, []

    def watched(self: Any, model: Any, piece: Tensor, kept: Any) -> Any:
        start = kept.tokens
        if start:
            held = kept.cache.layers[0].keys[0]
            seen = (whole[:, :start, None] == held[:, None]).all(-1).any(-1)
            sizes.append(seen.sum(1).tolist())
            mask[:, start : start + len(piece), :start] = seen.repeat_interleave(2, dim=0)[:, None]
        return extend(self, model, piece, kept)

    monkeypatch.setattr(PiecewisePress, "extend", watched)
    found = press.whole(model, text)
    with torch.inference_mode():
        plain = LlamaForCausalLM.from_pretrained(folder / "one")
        expected = plain(text[None], attention_mask=mask[None]).logits[0]
    torch.testing.assert_close(found, expected, rtol=0, atol=1e-4)
    assert not torch.allclose(plain(text[None]).logits[0, -PIECE:], found[-PIECE:], atol=1e-2)
    # The first piece is shorter; from the second one on there are as many slots as the whole is to have.
    target = ceil(LENGTH / ratio)
    assert sizes == [[LENGTH % PIECE] * 2, *[[min(target, LENGTH % PIECE + n * PIECE)] * 2 for n in (1, 2)]]
    _, kept = press.read(model, text)
    assert press.slots(model, kept).tolist() == [[target] * 2]


@needs_kvpress
def test_the_command_in_pieces(
    folder: Path,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capfd: pytest.CaptureFixture[str],
) -> None:
    monkeypatch.chdir(folder)
    monkeypatch.setattr(piecewise, "PIECE", 16)
    base, report = tmp_path / "base.json", tmp_path / "tova.json"
    assert main(["evaluate", "base", "--text", "text", "--output", str(base), "--amount", "smoke"]) == 0
    words = ["evaluate", "base", "--text", "text", "--base", str(base), "--output", str(report)]
    words += ["--baseline", "piecewise_tova", "--compression-ratio", "2"]
    assert main(words) == 0, capfd.readouterr().err
    found = json.loads(report.read_text())
    assert found["baseline"] == {"compression_ratio": 2.0, "press": "piecewise_tova"}
    assert found["kl"] > 1e-3 and found["kl_by_quarter"][0] < 1e-6 and len(found["copying"]) == 1
    assert is_report(found, json.loads(base.read_text()))
    assert not is_report({**found, "kl": None}, json.loads(base.read_text()))
    (served,) = found["serving"]
    assert served["compression_ratio"] == pytest.approx(2, rel=0.02)
