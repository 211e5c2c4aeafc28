"""Pooling and attention of a sequence that is cut over a context-parallel group; test_layouts.py tests whole retrofits."""

import json
from pathlib import Path

import pytest

from tests.support.processes import run_ranks

pytestmark = pytest.mark.distributed


@pytest.mark.parametrize(("ranks", "seq"), [(2, 28), (4, 40)], ids=["CP2-T28", "CP4-T40"])
def test_pooling_and_attention_equal_the_oracle(ranks: int, seq: int, tmp_path: Path) -> None:
    """Chunks of odd length; outputs and all gradients in float64, every form of attention, both exchanges."""
    worker = "tests.distributed.context_parallel_worker"
    for done in run_ranks(ranks, "-m", worker, seq, tmp_path / "errors.json"):
        assert done.returncode == 0, done.stderr[-3000:]
    errors = json.loads((tmp_path / "errors.json").read_text())
    assert len(errors) > 40
    assert max(errors.values()) <= 1e-12, {name: error for name, error in errors.items() if error > 1e-12}
