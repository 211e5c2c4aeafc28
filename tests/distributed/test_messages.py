"""What the compression loss costs in messages: one small all-reduce per step, and nothing inside of it."""

import json
from collections import Counter
from pathlib import Path

import pytest

from megatron_dmc.cluster_check.cases import run_folder
from megatron_dmc.cluster_check.launch import run_layouts
from megatron_dmc.cluster_check.layouts import REFERENCE, all_layouts
from tests.distributed.counting_worker import CASE

pytestmark = pytest.mark.distributed

LAYOUTS = [
    layout
    for layout in all_layouts()
    if layout.name in (REFERENCE, "TP2+SP", "PP2", "DP2, distributed optimizer, overlap")
]
# Float64. 4 layers, 2 KV heads: four counts of each; an offset's two slopes; two losses, tokens, requests to stop.
STATISTICS = f"allreduce_ {8 * (4 * 4 * 2 + 6)}"
# The number of valid tokens, float32, while the gate is open.
VALID_TOKENS = "allreduce_ 4"


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("messages")
    assert not run_layouts(folder, LAYOUTS, [CASE], 8, ("-m", "tests.distributed.counting_worker"))
    return folder


@pytest.mark.parametrize("layout", [pytest.param(x, id=x.name) for x in LAYOUTS])
def test_compression_loss_costs_one_small_all_reduce_per_step(folder: Path, layout: object) -> None:
    steps = json.loads((run_folder(folder, CASE, layout) / "result.json").read_text())["steps"]
    before, after = ([step for step in steps if step["merging"] is merging] for merging in (False, True))
    # The first step of a run sets things up.
    plain = Counter(before[-1]["whole"])
    assert plain[STATISTICS] == 1
    assert any(step["compression_loss"] > 0 for step in after)
    for step in after:
        assert step["inside"] == before[-1]["inside"]
        assert Counter(step["whole"]) - plain == Counter({VALID_TOKENS: 1})
        assert not plain - Counter(step["whole"])
