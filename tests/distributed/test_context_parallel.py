"""Pooling and attention of a sequence that is cut over a context-parallel group; whole retrofits are test_layouts.py's."""

import json
import os
import socket
import subprocess
import sys
from pathlib import Path

import pytest

pytestmark = pytest.mark.distributed

FOLDER = Path(__file__).parent


def start(script: str, ranks: int, *arguments: str) -> None:
    """A script in as many processes, which find one another."""
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        port = probe.getsockname()[1]
    environment = {**os.environ, "OMP_NUM_THREADS": "1", "PYTHONWARNINGS": "ignore", "MASTER_ADDR": "127.0.0.1"}
    environment |= {"MASTER_PORT": str(port), "WORLD_SIZE": str(ranks)}
    command = [sys.executable, str(FOLDER / script), *arguments]
    started = [
        subprocess.Popen(command, env={**environment, "RANK": str(rank)}, stderr=subprocess.PIPE, text=True)
        for rank in range(ranks)
    ]
    try:
        for process in started:
            said = process.communicate(timeout=600)[1]
            assert process.returncode == 0, said[-3000:]
    finally:
        for process in started:
            process.kill()


@pytest.mark.parametrize(("ranks", "seq"), [(2, 28), (4, 40)], ids=["CP2-T28", "CP4-T40"])
def test_pooling_and_attention_equal_the_oracle(ranks: int, seq: int, tmp_path: Path) -> None:
    """Chunks of odd length; outputs and all gradients in float64, every form of attention, both exchanges."""
    start("context_parallel_worker.py", ranks, str(seq), str(tmp_path / "errors.json"))
    errors = json.loads((tmp_path / "errors.json").read_text())
    assert len(errors) > 40
    assert max(errors.values()) <= 1e-12, {name: error for name, error in errors.items() if error > 1e-12}
