"""The GPU check's own logic, on a CPU: it passes what is right and flags what is not."""

import sys
from types import ModuleType

import pytest
import torch
from torch import Tensor

from tests.support.processes import ROOT, run
from tests.support.scripts import load_benchmark


@pytest.fixture
def gpu_check(monkeypatch: pytest.MonkeyPatch) -> ModuleType:
    return load_benchmark("gpu_check", monkeypatch)


def test_a_wrong_result_is_flagged(gpu_check: ModuleType) -> None:
    x = torch.linspace(1, 2, 64, dtype=torch.float32)

    def compare(fast_factor: float) -> list[bool]:
        rows = gpu_check.compare("product", lambda y: fast_factor * y, lambda y: 3 * y, [x], ["y"])
        return [row["ok"] for row in rows]

    assert compare(3.0) == [True, True]
    assert compare(3.1) == [False, False]
    assert compare(float("nan")) == [False, False]


def test_a_gradient_that_never_comes_counts_as_zero(gpu_check: ModuleType) -> None:
    def half(x: Tensor, y: Tensor) -> Tensor:
        return x + y.detach()

    inputs = [torch.ones(3), torch.ones(3)]
    rows = gpu_check.compare("sum", half, lambda x, y: x + y, inputs, ["x", "y"])
    assert [row["ok"] for row in rows] == [True, True, False]


@pytest.mark.skipif(torch.cuda.is_available(), reason="for machines without CUDA")
def test_without_cuda_it_says_so_in_one_line(
    gpu_check: ModuleType, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr(sys, "argv", ["gpu_check.py"])
    assert gpu_check.main() == 0
    assert capsys.readouterr().out == "gpu-check: no CUDA device here, nothing was checked\n"


def test_all_checks_pass_at_toy_size_on_a_cpu() -> None:
    done = run(ROOT / "benchmarks" / "gpu_check.py", "--device", "cpu", "--rounds", "1", timeout=300)
    assert done.returncode == 0, done.stdout + done.stderr
    forms = [
        f"{form}, {channel}"
        for form in ("attention", "attention, window, merge", "attention, window, evict")
        for channel in ("free channel", "no free channel")
    ]
    checks, times = (
        {line.strip().split("  ")[0] for line in part.splitlines()}
        for part in done.stdout.split("forward + backward, bf16")
    )
    assert checks >= {
        f"{form}, {decisions}" for form in forms for decisions in ("soft", "hard", "soft, packed documents")
    } | {"pooling"}
    assert times >= {*forms, "pooling", "step, projection"}
