"""What counts as the same step, and what the report says of it."""

import copy
import json
import math
from pathlib import Path
from typing import Any

import pytest

from megatron_dmc.cluster_check.cases import CASES, run_folder
from megatron_dmc.cluster_check.compare import compare
from megatron_dmc.cluster_check.layouts import REFERENCE, all_layouts
from megatron_dmc.cluster_check.report import is_good, make_report, remarks, table, verdict, write_section

STEP: dict[str, Any] = {
    "lm_loss": 5.0,
    "distillation_loss": None,
    "gradient_norm": 2.0,
    "compression_loss": 0.0,
    "compression_ratio": 1.5,
    "noisy_compression_ratio": 1.6,
    # Merged with noise, merged without, tokens; of 2 layers with 2 KV heads.
    "counts": [[[10, 20], [30, 40]], [[5, 6], [7, 8]], [[1000, 1000], [1000, 1000]]],
}


def changed(**values: Any) -> list[dict[str, Any]]:
    return [STEP, copy.deepcopy(STEP) | values]


@pytest.mark.parametrize(
    ("values", "precision", "allowed"),
    [
        ({}, "fp32", True),
        ({"lm_loss": 5.0 * (1 + 1e-5)}, "fp32", True),
        ({"lm_loss": 5.0 * (1 + 3e-5)}, "fp32", False),
        ({"lm_loss": 5.0 * (1 + 3e-5)}, "bf16", True),
        ({"gradient_norm": 2.1}, "bf16", False),
        ({"gradient_norm": math.nan}, "fp32", False),
        ({"distillation_loss": 0.1}, "fp32", False),
        ({"compression_loss": 0.1}, "fp32", False),
        ({"compression_ratio": 1.51}, "fp32", False),
    ],
    ids=str,
)
def test_largest_difference_decides(values: dict[str, Any], precision: str, allowed: bool) -> None:
    difference = compare(changed(**values), [STEP, STEP], precision)
    assert difference.allowed is allowed
    if values:
        assert (difference.quantity, difference.step) == (*values, 2)


def test_flipped_decisions_change_counts_and_nothing_else() -> None:
    counts = copy.deepcopy(STEP["counts"])
    counts[1][0][1] += 1
    difference = compare(changed(counts=counts, compression_ratio=1.501), [STEP, STEP], "fp32")
    assert (difference.flips, difference.decisions, difference.relative) == (1, 16000, 0)
    assert difference.allowed
    assert not compare(changed(counts=counts, lm_loss=5.01), [STEP, STEP], "fp32").allowed
    # More than rounding can explain, although the sums agree.
    counts[0][0] = [20, 10]
    assert not compare(changed(counts=counts), [STEP, STEP], "fp32").allowed
    counts[2][0][0] += 1
    with pytest.raises(ValueError, match="number of tokens"):
        compare(changed(counts=counts), [STEP, STEP], "fp32")


def test_report_names_what_differs_and_what_was_left_out(tmp_path: Path) -> None:
    layouts = [x for x in all_layouts() if x.name in (REFERENCE, "TP2", "PP2", "CP2", "DP2", "TP2xPP2")]
    case = CASES[0]
    results: dict[str, Any] = {
        REFERENCE: {"steps": [STEP, STEP]},
        "TP2": {"steps": changed(lm_loss=6.0)},
        "PP2": {"steps": [STEP, STEP]},
        "CP2": {"refused": "not here"},
    }
    for layout in layouts:
        if layout.name in results:
            folder = run_folder(tmp_path, case, layout)
            folder.mkdir(parents=True)
            (folder / "result.json").write_text(json.dumps(results[layout.name]))
    failures = {("DP2", case.name): "a rank was lost"}
    report = make_report(tmp_path, layouts, [case], failures, {"TP2xPP2": "needs 4 GPUs, here are 2"})
    assert not is_good(report)
    assert table(report)[2:] == [
        "| TP2 | 2 | **2.0e-01 DIFFERENT** |",
        "| PP2 | 2 | 0 |",
        "| CP2 | 2 | left out |",
        "| DP2 | 2 | FAILED |",
        "| TP2xPP2 | 4 | left out |",
    ]
    assert remarks(report) == [
        "TP2, projection differs: lm_loss of step 2 by 2.0e-01, and 0 of 16000 decisions",
        "CP2 is left out: not here",
        "DP2, projection failed: a rank was lost",
        "TP2xPP2 is left out: needs 4 GPUs, here are 2",
    ]
    assert verdict(report) == (
        "FAILED: of 5 results 1 different from one process, 1 failed, 2 left out; largest difference 2.0e-01 in fp32 "
        "(tolerance 2e-05)"
    )
    page = tmp_path / "page.md"
    page.write_text("# Page\n\n## Table\n\nold\n\n## After\n\nkept\n")
    write_section(report, page, "## Table")
    text = page.read_text()
    assert "old" not in text and text.endswith("\n\n## After\n\nkept\n") and "\n".join(table(report)) in text
    good = [layout for layout in layouts if layout.name in (REFERENCE, "PP2", "CP2")]
    report = make_report(tmp_path, good, [case], {}, {})
    assert is_good(report)
    assert verdict(report) == (
        "1 layout x 1 case (1 of 2 results left out) agree with one process: largest difference 0 in fp32 (tolerance 2e-05)"
    )
    assert verdict(make_report(tmp_path, good[:1], [case], {}, {})) == "no layout was compared with one process"


def test_the_verdict_names_every_precision(tmp_path: Path) -> None:
    reference, other = all_layouts()[0], all_layouts()[5]
    cases = [case for case in CASES if case.name in ("projection", "bf16")]
    for layout, steps in ((reference, [STEP, STEP]), (other, changed(lm_loss=5.0 * (1 + 1e-5)))):
        for case in cases:
            folder = run_folder(tmp_path, case, layout)
            folder.mkdir(parents=True)
            (folder / "result.json").write_text(json.dumps({"steps": steps}))
    assert verdict(make_report(tmp_path, [reference, other], cases, {}, {})) == (
        "1 layout x 2 cases agree with one process: largest difference 1.0e-05 in fp32 (tolerance 2e-05), 1.0e-05 in "
        "bf16 (tolerance 1e-02)"
    )
    for case in cases:
        (run_folder(tmp_path, case, other) / "result.json").unlink()
    assert verdict(make_report(tmp_path, [reference, other], cases, {}, {})) == (
        "FAILED: of 2 results 2 failed; largest difference unknown"
    )
