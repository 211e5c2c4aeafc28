"""Several ranks, and vLLM's other model runner: the same outputs, the same figures."""

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from tests.support import serve_offline
from tests.support.processes import run
from tests.support.served import Served, write

pytestmark = pytest.mark.distributed
TWO = {"tensor_parallel_size": 2}


def result(case: Served, folder: Path, options: dict[str, Any], **variables: str) -> dict[str, Any]:
    write(case, folder / "case.json")
    done = run(serve_offline.__file__, folder / "case.json", json.dumps(options), timeout=300, **variables)
    assert done.returncode == 0, done.stdout[-3000:] + done.stderr[-3000:]
    return dict(json.loads(next(line for line in reversed(done.stdout.splitlines()) if line.startswith("{"))))


@pytest.mark.parametrize(
    ("dmc", "family"),
    [({"per_layer": True}, "llama"), ({"decision_source": "neuron", "local_window": 4}, "qwen3")],
    ids=["per-layer", "qwen3-neuron"],
)
def test_two_tensor_parallel_ranks(
    export: Callable[..., Served], tmp_path: Path, dmc: dict[str, Any], family: str
) -> None:
    expected = export(dmc, family, lengths=(16, 101, 65))
    # So few that requests wait for one another.
    found = result(expected, tmp_path, {**TWO, "num_gpu_blocks_override": 36})
    assert found["outputs"] == expected.outputs
    figures = found["figures"]
    assert figures["vllm:kv_cache_usage_perc"] == figures["vllm:dmc_slots_used"] == 0
    # 3 layers of 2 heads: each rank reports its half.
    assert figures["vllm:dmc_cells_free"] == 35 * 3 * 2
    assert 0.6 * min(expected.ratios) < figures["vllm:dmc_compression_ratio"] < 1.2 * max(expected.ratios)


@pytest.mark.parametrize("options", [{"num_gpu_blocks_override": 36}, {"pipeline_parallel_size": 2}], ids=str)
def test_model_runner_v2(export: Callable[..., Served], tmp_path: Path, options: dict[str, Any]) -> None:
    expected = export({"local_window": 4}, lengths=(16, 101, 65))
    found = result(expected, tmp_path, options, **serve_offline.V2)
    assert found["v2"] is True
    assert found["outputs"] == expected.outputs
    assert found["figures"]["vllm:kv_cache_usage_perc"] == 0


def test_model_runner_v2_by_kernels(export: Callable[..., Served], tmp_path: Path) -> None:
    expected = export({"local_window": 4}, lengths=(16, 33), num_hidden_layers=2)
    options = {"max_model_len": 112, "num_gpu_blocks_override": 36}
    found = result(expected, tmp_path, options, **serve_offline.V2, **serve_offline.KERNELS)
    assert found["v2"] is True and found["kernels"] == "triton"
    assert found["outputs"] == expected.outputs
