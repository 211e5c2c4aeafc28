"""The GPU check's own logic, on a CPU: it passes what is right, flags what is not, and no part stops the next."""

import importlib
import json
import sys
import time
from collections.abc import Callable
from pathlib import Path
from types import ModuleType
from typing import Any

import pytest
import torch
from torch import Tensor

from tests.support.processes import ROOT, run
from tests.support.scripts import load_benchmark


@pytest.fixture
def gpu_check(monkeypatch: pytest.MonkeyPatch) -> ModuleType:
    # The check sets them for its process.
    monkeypatch.setenv("CUDA_VISIBLE_DEVICES", "")
    monkeypatch.setenv("KINETO_LOG_LEVEL", "9")
    return load_benchmark("gpu_check", monkeypatch)


@pytest.fixture
def measure(gpu_check: ModuleType) -> ModuleType:
    return importlib.import_module("gpu.measure")


@pytest.mark.parametrize(
    ("flag", "value", "message"),
    [
        ("--budget", "nan", "--budget must be a finite number, got nan"),
        ("--budget", "inf", "--budget must be a finite number, got inf"),
        ("--budget", "-1", "--budget must be >= 0, got -1"),
        ("--budget", "1e300", "--budget must be <= 604800, got 1e+300"),
        ("--budget", "", "argument --budget: invalid float value: ''"),
        ("--out", "", "argument --out: an empty path; name a file or a folder"),
        ("--out", "/dev/null", "argument --out: /dev/null is a device, not a folder; name another folder"),
        ("--parts", "", "--parts : no such part; there are environment,numbers,"),
        ("--parts", "banana", "--parts banana: no such part; there are environment,numbers,"),
    ],
)
def test_flags_that_cannot_be_are_refused_in_one_line(
    gpu_check: ModuleType, flag: str, value: str, message: str, capsys: pytest.CaptureFixture[str]
) -> None:
    with pytest.raises(SystemExit, match="2"):
        gpu_check.main(["--toy", f"{flag}={value}"])
    said = capsys.readouterr().err
    assert message in said and said.count("\n") == 1


def part(gpu_check: ModuleType, name: str, function: Callable[[Any], None], least: float = 0.0) -> Any:
    return gpu_check.Part(name, function, least)


def rows(folder: Path) -> list[dict[str, Any]]:
    return [json.loads(line) for line in (folder / "rows.jsonl").read_text(encoding="utf-8").splitlines()]


def kinds(folder: Path) -> list[tuple[str, str]]:
    return [(row["part"], row["kind"]) for row in rows(folder)]


def note(run: Any) -> None:
    run.row("note", seen=True)


def test_a_wrong_result_is_flagged(measure: ModuleType) -> None:
    x = torch.linspace(1, 2, 64, dtype=torch.float32)

    def compare(fast_factor: float) -> list[bool]:
        rows = measure.compare("product", lambda y: fast_factor * y, lambda y: 3 * y, [x], ["y"])
        return [row["ok"] for row in rows]

    assert compare(3.0) == [True, True]
    assert compare(3.1) == [False, False]
    assert compare(float("nan")) == [False, False]


def test_a_gradient_that_never_comes_counts_as_zero(measure: ModuleType) -> None:
    def half(x: Tensor, y: Tensor) -> Tensor:
        return x + y.detach()

    inputs = [torch.ones(3), torch.ones(3)]
    rows = measure.compare("sum", half, lambda x, y: x + y, inputs, ["x", "y"])
    assert [row["ok"] for row in rows] == [True, True, False]


@pytest.mark.parametrize("factor", [1.1, float("nan")])
def test_an_exceeded_bound_fails_the_check(
    gpu_check: ModuleType, measure: ModuleType, factor: float, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    def wrong(run: Any) -> None:
        for row in measure.compare("product", lambda y: factor * y, lambda y: y, [torch.ones(3)], ["y"]):
            run.row("check", **row)

    parts = [part(gpu_check, "wrong", wrong), part(gpu_check, "next", note)]
    assert gpu_check.main(["--toy", "--out", str(tmp_path)], parts) == 1
    assert kinds(tmp_path)[-2:] == [("next", "note"), ("next", "done")]
    assert "FAILED: product, output 0: " in capsys.readouterr().out
    assert json.loads((tmp_path / "summary.json").read_text())["failed"] is True


def test_a_part_that_fails_is_reported_and_the_next_one_runs(
    gpu_check: ModuleType, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    def broken(run: Any) -> None:
        run.attempt("a row of it", lambda: torch.ones(2) @ torch.ones(3))
        run.row("note", seen="after the row that failed")
        raise OSError("no such\nthing")

    parts = [part(gpu_check, "broken", broken), part(gpu_check, "next", note)]
    assert gpu_check.main(["--toy", "--out", str(tmp_path)], parts) == 1
    expected = [("broken", "failed"), ("broken", "note"), ("broken", "failed"), ("next", "note"), ("next", "done")]
    assert kinds(tmp_path) == expected
    whole = rows(tmp_path)[2]
    assert whole["error"] == "OSError: no such thing" and "in broken" in whole["trace"]
    assert "FAILED: broken, broken: OSError: no such thing" in capsys.readouterr().out


def test_a_part_whose_module_is_broken_stops_no_other(gpu_check: ModuleType, tmp_path: Path) -> None:
    parts = [part(gpu_check, "absent", gpu_check.later("absent", "absent")), part(gpu_check, "next", note)]
    assert gpu_check.main(["--toy", "--out", str(tmp_path)], parts) == 1
    assert kinds(tmp_path) == [("absent", "failed"), ("next", "note"), ("next", "done")]
    assert rows(tmp_path)[0]["error"].startswith("ModuleNotFoundError")


def test_what_does_not_fit_into_the_budget_is_skipped_and_says_so(
    gpu_check: ModuleType, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    assert gpu_check.main(["--toy", "--budget", "0", "--out", str(tmp_path)]) == 0
    assert kinds(tmp_path) == [(part.name, "skipped") for part in gpu_check.PARTS]
    assert capsys.readouterr().out.count("SKIPPED: ") == len(gpu_check.PARTS)


def test_a_part_skips_its_rows_after_the_end_of_the_budget(gpu_check: ModuleType, tmp_path: Path) -> None:
    def long(run: Any) -> None:
        run.attempt("first", lambda: note(run))
        while run.left() >= 0:
            time.sleep(0.05)
        run.attempt("second", lambda: note(run))

    parts = [part(gpu_check, "long", long), part(gpu_check, "next", note)]
    assert gpu_check.main(["--toy", "--budget", "0.5", "--out", str(tmp_path)], parts) == 0
    assert kinds(tmp_path) == [("long", "note"), ("long", "skipped"), ("long", "done"), ("next", "skipped")]


def test_rows_are_in_the_file_as_soon_as_they_are_made(gpu_check: ModuleType, tmp_path: Path) -> None:
    seen = []

    def look(run: Any) -> None:
        note(run)
        seen.extend(kinds(tmp_path))

    assert gpu_check.main(["--toy", "--out", str(tmp_path)], [part(gpu_check, "look", look)]) == 0
    assert seen == [("look", "note")]


def test_a_lost_gpu_leaves_the_other_parts_to_another_process(gpu_check: ModuleType, tmp_path: Path) -> None:
    def lose(run: Any) -> None:
        raise gpu_check.DeviceLostError("an illegal memory access")

    parts = [part(gpu_check, name, lose if name == "lost" else note) for name in ("first", "lost", "third", "fourth")]
    check = gpu_check.Run(tmp_path, "cpu", gpu_check.TOY, 100)
    assert [x.name for x in gpu_check.run_parts(check, parts)] == ["third", "fourth"]
    # What the other process is called with: it adds to the rows, and sums up both processes'.
    arguments = ["--toy", "--out", str(tmp_path), "--parts", "third,fourth", "--go-on"]
    assert gpu_check.main(arguments, parts) == 0
    names = [x["part"] for x in json.loads((tmp_path / "summary.json").read_text())["parts"]]
    assert names == ["first", "third", "fourth"]


def test_another_process_goes_on_where_the_gpu_was_lost(tmp_path: Path) -> None:
    program = f"""
import sys
sys.path.insert(0, {str(ROOT / "benchmarks")!r})
import gpu_check
def lose(run):
    raise gpu_check.DeviceLostError
parts = [gpu_check.Part("lost", lose, 0), gpu_check.Part("environment", lose, 0), gpu_check.Part("noise", lose, 0)]
gpu_check.main(["--toy", "--out", {str(tmp_path)!r}], parts)
"""
    done = run("-c", program)
    assert done.returncode == 0 and "a new one goes on" in done.stdout, done.stdout + done.stderr
    summary = json.loads((tmp_path / "summary.json").read_text())
    assert [(x["part"], x["ended"]) for x in summary["parts"]] == [("environment", "yes"), ("noise", "yes")]


def test_rows_of_another_check_are_left_alone(
    gpu_check: ModuleType, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    (tmp_path / "rows.jsonl").write_text("{}\n")
    assert gpu_check.main(["--toy", "--out", str(tmp_path)]) == 2
    assert (tmp_path / "rows.jsonl").read_text() == "{}\n" and len(list(tmp_path.iterdir())) == 1
    assert "name another folder" in capsys.readouterr().err


def test_other_peoples_files_are_left_alone(
    gpu_check: ModuleType, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    (tmp_path / "summary.json").write_text("mine")
    for more in ([], ["--go-on"]):
        assert gpu_check.main(["--toy", "--out", str(tmp_path), *more]) == 2
        assert "holds other files than a check's; name a new folder" in capsys.readouterr().err
    assert (tmp_path / "summary.json").read_text() == "mine" and len(list(tmp_path.iterdir())) == 1


def test_it_goes_on_after_a_row_that_was_cut(gpu_check: ModuleType, tmp_path: Path) -> None:
    (tmp_path / "rows.jsonl").write_text('{"t": 0, "part": "first", "kind": "note"}\n{"t": 1, "pa')
    assert gpu_check.main(["--toy", "--go-on", "--out", str(tmp_path)], [part(gpu_check, "look", note)]) == 0
    assert ("first", "note") in kinds(tmp_path) and ("look", "note") in kinds(tmp_path)


def test_an_unknown_part_is_refused(gpu_check: ModuleType, capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit):
        gpu_check.main(["--toy", "--parts", "noise,nosie"])
    assert "--parts nosie: no such part; there are environment,numbers," in capsys.readouterr().err


def test_a_process_that_takes_too_long_is_ended_with_all_that_it_started(gpu_check: ModuleType, tmp_path: Path) -> None:
    training_run = importlib.import_module("gpu.training_run")
    late = tmp_path / "late"
    child = f"import time; time.sleep(3); open({str(late)!r}, 'w')"
    parent = f"import subprocess, sys; print('started', flush=True); subprocess.run([sys.executable, '-c', {child!r}])"
    assert training_run.run_limited([sys.executable, "-c", parent], tmp_path / "output", 1.5) is None
    time.sleep(4)
    assert not late.exists()


@pytest.mark.skipif(torch.cuda.is_available(), reason="for machines without CUDA")
def test_without_cuda_it_says_so_in_one_line(gpu_check: ModuleType, capsys: pytest.CaptureFixture[str]) -> None:
    assert gpu_check.main([]) == 0
    assert capsys.readouterr().out == "gpu-check: no CUDA device here, nothing was checked\n"


def test_all_parts_come_to_their_end_at_toy_size(gpu_check: ModuleType, tmp_path: Path) -> None:
    done = run(ROOT / "benchmarks" / "gpu_check.py", "--toy", "--budget", "500", "--out", tmp_path, timeout=580)
    assert done.returncode == 0, done.stdout + done.stderr
    summary = json.loads((tmp_path / "summary.json").read_text())
    assert [x["part"] for x in summary["parts"]] == [x.name for x in gpu_check.PARTS]
    assert all(x["ended"] == "yes" and x["broken"] == x["skipped"] == 0 for x in summary["parts"])
    assert "gpu-check on no GPU: toy sizes on a CPU" in done.stdout and summary["card"] in done.stdout.splitlines()[-2]
    forms = [
        f"{form}, {channel}"
        for form in ("attention", "attention, window, merge", "attention, window, evict")
        for channel in ("free channel", "no free channel")
    ]
    checks = {row["check"] for row in summary["checks"]}
    assert checks >= {f"{form}, {kind}" for form in forms for kind in ("soft", "hard", "soft, packed documents")}
    assert checks >= {
        "pooling",
        "plain attention",
        "noise",
        "step, base",
        "step, projection",
        "cache, torch, window 5, merge",
    }
    times = {row["name"]: row for row in summary["times"]}
    assert times.keys() >= {*forms, "flash", "torch's choice", "pooling", "base", "projection", "plain", "cache, torch"}
    assert all(row["kernels"] > 0 and row["busy_ms"] > 0 for row in times.values())
    assert {row["name"] for row in summary["waits"]} == {"base", "neuron", "projection"}
