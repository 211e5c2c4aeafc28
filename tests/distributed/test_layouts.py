"""Every layout computes the same retrofit: the cluster check's runs, on gloo.

Only what is selected is run, so that ``-m quick`` is quick.
"""

from pathlib import Path
from typing import Any

import pytest
from torch import Tensor

from megatron_dmc.cluster_check.cases import CASES, Case, run_folder
from megatron_dmc.cluster_check.launch import run_layouts
from megatron_dmc.cluster_check.layouts import REFERENCE, Layout, all_layouts
from megatron_dmc.cluster_check.report import make_report
from megatron_dmc.inference.loading import load_model

pytestmark = pytest.mark.distributed

LAYOUTS = {layout.name: layout for layout in all_layouts()}
PROJECTION = CASES[0]
QUICK_LAYOUTS = ("micro-batch 1", "TP2+SP", "PP2xVPP2", "DP2, distributed optimizer, overlap")
QUICK_CASES = ("projection", "neuron")
# What differs in these is attention's inputs, which tensor and context parallelism divide.
FAMILY_CASES = {"Qwen2, neuron", "Qwen3, zero_out, neuron"}
FAMILY_LAYOUTS = ("TP2+SP", "CP2", "DP2, distributed optimizer, overlap", "TP2xPP2")
# Ten seconds a case or more, on two cores: one case for each operation, both sources of decisions, packed documents, an
# adapter, a teacher, calibration. make cluster-check runs all cases in them.
LARGE_LAYOUTS = ("CP2xTP2+SP", "TP2xPP2xDP2")
LARGE_CASES = {
    "projection",
    "neuron",
    "window, distilled",
    "eviction, adapter, distilled",
    "absorbing, packed documents",
    "calibrated",
}
# Adam's step is 1e-3: weights that are one step old would show.
WEIGHT_TOLERANCE = 1e-4


def parameters() -> list[Any]:
    pairs = [
        (layout, case)
        for layout in LAYOUTS.values()
        for case in CASES
        if layout.name != REFERENCE and _group(layout, case) is not None
    ]
    return [
        pytest.param(
            layout,
            case,
            id=f"{layout.name}-{case.name}",
            marks=[pytest.mark.quick] if layout.name in QUICK_LAYOUTS and case.name in QUICK_CASES else [],
        )
        for layout, case in pairs
    ]


def _group(layout: Layout, case: Case) -> str | None:
    """Which of three sets of runs these belong to, each with all of its layouts and all of its cases; None: to none."""
    if case.name in FAMILY_CASES:
        return "families" if layout.name in FAMILY_LAYOUTS else None
    if layout.name in LARGE_LAYOUTS:
        return "large" if case.name in LARGE_CASES else None
    return "all cases"


@pytest.fixture(scope="module")
def runs(tmp_path_factory: pytest.TempPathFactory, request: pytest.FixtureRequest) -> Path:
    """The folder of all runs that the selected tests look at."""
    selected = [item.callspec.params for item in request.session.items if item.path == request.node.path]
    folder = tmp_path_factory.mktemp("layouts")
    for group in ("all cases", "large", "families"):
        chosen = [each for each in selected if _group(each["layout"], each["case"]) == group]
        layouts = [x for x in LAYOUTS.values() if x.name == REFERENCE or x in [each["layout"] for each in chosen]]
        cases = [case for case in CASES if case in [each["case"] for each in chosen]]
        assert not chosen or not run_layouts(folder, layouts, cases, 8)
    return folder


@pytest.mark.parametrize(("layout", "case"), parameters())
def test_layout_equals_one_process(runs: Path, layout: Layout, case: Case) -> None:
    (row,) = make_report(runs, [LAYOUTS[REFERENCE], layout], [case], {}, {})["rows"]
    assert row["outcome"] == "same", row


@pytest.fixture(scope="module")
def expected_weights(runs: Path, one_process: None) -> dict[str, Tensor]:
    final = run_folder(runs, PROJECTION, LAYOUTS[REFERENCE]) / "checkpoints" / "final"
    return dict(load_model(final).model.named_parameters())


@pytest.mark.parametrize("case", [PROJECTION], ids=["projection"])
@pytest.mark.parametrize(
    "layout",
    [
        pytest.param(x, id=x.name, marks=[pytest.mark.quick] if x.name in QUICK_LAYOUTS else [])
        for x in LAYOUTS.values()
        if x.processes > 1
    ],
)
def test_saved_weights_are_those_of_the_last_step(
    runs: Path, expected_weights: dict[str, Tensor], layout: Layout, case: Case
) -> None:
    saved = run_folder(runs, case, layout) / "checkpoints" / "final"
    if not saved.exists():
        pytest.skip("this layout did not run")
    weights = dict(load_model(saved).model.named_parameters())
    assert weights.keys() == expected_weights.keys()
    for name, weight in weights.items():
        assert float((weight - expected_weights[name]).abs().max()) < WEIGHT_TOLERANCE, name
