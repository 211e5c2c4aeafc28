"""Another ratio than the trained one: decisions above another threshold, per call and per sequence, and the measured curve."""

import json
import math
from pathlib import Path
from typing import Any

import pytest
import torch

from megatron_dmc.hf.cache import CACHE_NAME
from megatron_dmc.hf.curve import CompressionCurve
from megatron_dmc.hf.families.llama import DMCLlamaConfig, DMCLlamaForCausalLM

CURVE = {"tokens": 100, "ratios": [1.5, 3.0, 6.0], "thresholds": [2.0, 0.5, -1.0]}
# Logits of these models are tens apart.
THRESHOLDS = torch.tensor([30.0, -30.0, 0.0])


@torch.no_grad()
def test_a_lower_threshold_merges_more(model: Any, prompt: torch.Tensor) -> None:
    ratios = [
        model(prompt, use_cache=True, merge_threshold=threshold).past_key_values.compression_ratio
        for threshold in (1e6, 20.0, 0.0, -20.0, -1e6)
    ]
    assert ratios[0] == 1 and ratios == sorted(ratios) and len(set(ratios)) == 5
    assert model(prompt, use_cache=True).past_key_values.compression_ratio == ratios[2]


@torch.no_grad()
def test_each_sequence_has_its_own(model: Any, prompt: torch.Tensor) -> None:
    for use_cache in (False, True):
        together = model(prompt, use_cache=use_cache, merge_threshold=THRESHOLDS).logits
        alone = [
            model(row[None], use_cache=use_cache, merge_threshold=float(threshold)).logits
            for row, threshold in zip(prompt, THRESHOLDS, strict=True)
        ]
        torch.testing.assert_close(together, torch.cat(alone), rtol=0, atol=2e-4)
    assert not torch.allclose(together, model(prompt).logits)


def test_generate_takes_it_with_padding_and_beams(
    projection_model: Any, left_padded: tuple[torch.Tensor, torch.Tensor]
) -> None:
    padded, mask = left_padded
    for options in ({}, {"num_beams": 2, "length_penalty": 0.0}):
        options = {"max_new_tokens": 12, "min_new_tokens": 12, "do_sample": False, **options}
        together = projection_model.generate(padded, attention_mask=mask, merge_threshold=THRESHOLDS, **options)
        for row, (ids, real, threshold) in enumerate(zip(padded, mask, THRESHOLDS, strict=True)):
            alone = projection_model.generate(ids[real.bool()][None], merge_threshold=float(threshold), **options)
            assert torch.equal(alone[0, -12:], together[row, -12:])


@torch.no_grad()
@pytest.mark.parametrize(
    "threshold",
    [
        math.nan,
        math.inf,
        1e7,
        10**400,
        pytest.param(10**9000, id="thousands-of-digits"),
        "1",
        True,
        torch.full((3,), math.nan),
        torch.zeros(2),
        torch.zeros(3, 1),
        torch.zeros(3, dtype=torch.int64),
    ],
)
def test_what_is_no_threshold_is_refused(projection_model: Any, prompt: torch.Tensor, threshold: Any) -> None:
    cache = projection_model(prompt, use_cache=True)[CACHE_NAME]
    with pytest.raises(ValueError, match=r"merge_threshold must be (a number|numbers)"):
        projection_model(prompt, merge_threshold=threshold, **{CACHE_NAME: cache})
    # Nothing has been taken in.
    assert cache.columns == prompt.shape[1]
    projection_model(prompt[:, :1], **{CACHE_NAME: cache})


def test_an_export_keeps_its_threshold_and_its_curve(
    projection_model: Any, prompt: torch.Tensor, tmp_path: Path
) -> None:
    projection_model.save_pretrained(tmp_path)
    saved = json.loads((tmp_path / "config.json").read_text())
    assert not saved.get("merge_threshold") and saved.get("compression_curve") is None
    (tmp_path / "config.json").write_text(json.dumps(saved | {"merge_threshold": 20.0, "compression_curve": CURVE}))
    model = DMCLlamaForCausalLM.from_pretrained(tmp_path)
    with torch.no_grad():
        assert torch.equal(model(prompt).logits, projection_model(prompt, merge_threshold=20.0).logits)
        other = DMCLlamaForCausalLM.from_pretrained(tmp_path, merge_threshold=-20.0)
        assert torch.equal(other(prompt).logits, projection_model(prompt, merge_threshold=-20.0).logits)
    model.save_pretrained(tmp_path / "again")
    config = DMCLlamaConfig.from_pretrained(tmp_path / "again")
    assert config.merge_threshold == 20.0 and config.compression_curve == CURVE
    assert config.threshold_of(3.0) == 0.5


def test_between_two_points_lies_the_line_in_the_logarithm() -> None:
    curve = CompressionCurve.from_dict(CURVE)
    assert [curve.threshold(ratio) for ratio in CURVE["ratios"]] == CURVE["thresholds"]
    assert curve.threshold(3 * math.sqrt(2)) == pytest.approx(-0.25)
    assert curve.threshold(2) == pytest.approx(2 - 1.5 * math.log(2 / 1.5) / math.log(2))
    for ratio in (1.4, 6.1, 0, -1, math.nan, math.inf, "4", None, True):
        with pytest.raises(ValueError, match=r"compression_ratio must be from 1\.5 to 6, which were measured"):
            curve.threshold(ratio)


def test_a_curve_of_one_point() -> None:
    curve = CompressionCurve(8, (1.0,), (0.0,))
    assert curve.threshold(1) == 0
    with pytest.raises(ValueError, match="from 1 to 1"):
        curve.threshold(2)


@pytest.mark.parametrize(
    "change",
    [
        {"tokens": 0},
        {"tokens": 1.5},
        {"tokens": True},
        {"ratios": []},
        {"ratios": 3},
        {"ratios": [1.5, 3.0]},
        {"ratios": [1.5, 1.5, 6.0]},
        {"ratios": [0.5, 3.0, 6.0]},
        {"ratios": [1.5, 3.0, math.inf]},
        {"ratios": [1.5, 3.0, 10**400]},
        {"ratios": [1.5, "3", 6.0]},
        {"thresholds": [0.5, 2.0, -1.0]},
        {"thresholds": [2.0, math.nan, -1.0]},
        {"thresholds": [2.0, 0.5, None]},
        {"other": 1},
    ],
)
def test_a_damaged_curve_is_refused(change: dict[str, Any]) -> None:
    with pytest.raises(ValueError, match="compression_curve"):
        DMCLlamaConfig(compression_curve=CURVE | change)


@pytest.mark.parametrize("curve", [[], "x", 3, {}])
def test_what_is_no_curve_is_refused(curve: Any) -> None:
    with pytest.raises(ValueError, match="compression_curve must have ratios, thresholds, tokens"):
        DMCLlamaConfig(compression_curve=curve)


@pytest.mark.parametrize("threshold", [math.nan, "0", None, 1e7])
def test_a_configurations_threshold_is_checked(threshold: Any) -> None:
    with pytest.raises(ValueError, match="merge_threshold must be a number"):
        DMCLlamaConfig(merge_threshold=threshold)


def test_a_ratio_without_a_curve() -> None:
    with pytest.raises(ValueError, match="run megatron-dmc ratios on the export"):
        DMCLlamaConfig().threshold_of(4)
