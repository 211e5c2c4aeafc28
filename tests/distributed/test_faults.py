"""Fault injection: the comparison of layouts can fail, and finds the faults it was made for."""

from pathlib import Path

import pytest

from megatron_dmc.cluster_check.cases import CASES
from megatron_dmc.cluster_check.launch import run_layouts
from megatron_dmc.cluster_check.layouts import REFERENCE, all_layouts
from megatron_dmc.cluster_check.report import is_good, make_report

pytestmark = pytest.mark.distributed


@pytest.mark.parametrize(
    ("fault", "outcomes"),
    [
        ("noise", {"TP2": "different", "PP2": "different", "DP2": "different"}),
        # Pipeline stages and replicas hold all heads.
        ("loss", {"TP2": "different"}),
        ("messages", {"PP2": "same", "PP2xVPP2": "different"}),
        # A layout after one that broke runs all the same.
        ("lost rank", {"TP2": "failed", "DP2": "same"}),
    ],
)
def test_fault_is_found(tmp_path: Path, fault: str, outcomes: dict[str, str]) -> None:
    layouts = [layout for layout in all_layouts() if layout.name in (REFERENCE, *outcomes)]
    cases = [case for case in CASES if case.name == "neuron"]
    failures = run_layouts(tmp_path, layouts, cases, 8, ("-m", "tests.distributed.broken_worker", fault))
    report = make_report(tmp_path, layouts, cases, failures, {})
    assert {row["layout"]: row["outcome"] for row in report["rows"]} == outcomes
    assert not is_good(report)
