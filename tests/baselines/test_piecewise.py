"""kvpress' methods while a text is read, against attention in which what they dropped is masked. Needs make kvpress."""

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
from megatron_dmc.baselines.presses import PIECEWISE
from megatron_dmc.cli import main
from megatron_dmc.evaluation.exported.model import load
from megatron_dmc.evaluation.exported.report import is_report
from tests.baselines.test_press import folder, needs_kvpress, tokens  # noqa: F401  (a fixture)

pytestmark = needs_kvpress
NAMES = pytest.mark.parametrize("name", PIECEWISE)
LENGTH = 3 * PIECE + 17


@NAMES
def test_nothing_is_dropped_at_a_ratio_of_one(folder: Path, name: str) -> None:  # noqa: F811
    press = PiecewisePress(1.0, name)
    model, text = load(folder / "base", torch.float32, press.attention), tokens(LENGTH)
    with torch.inference_mode():
        torch.testing.assert_close(press.whole(model, text), model(text[None]).logits[0], rtol=0, atol=1e-4)
        logits, kept = press.read(model, text[:-5])
        more, kept = press.extend(model, text[-5:], kept)
        torch.testing.assert_close(torch.cat([logits, more]), model(text[None]).logits[0, -6:], rtol=0, atol=1e-4)
    assert press.slots(model, kept).tolist() == [[LENGTH] * 2] * 2


@NAMES
@pytest.mark.parametrize("ratio", [2.0, 5.0])
def test_what_was_dropped_is_not_attended_to(
    folder: Path,  # noqa: F811
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


def test_the_command(
    folder: Path,  # noqa: F811
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
