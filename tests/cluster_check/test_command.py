"""What the command refuses before anything runs, and what it says it did not run."""

import contextlib
import os
import re
import signal
import time
from collections.abc import Callable
from pathlib import Path

import pytest

from megatron_dmc.cli import cluster_check, run_alone
from megatron_dmc.cli.cluster_check import HEADING
from megatron_dmc.cluster_check.cases import CASES, cases_here, cases_not_here
from megatron_dmc.cluster_check.launch import LOG, WORKER, CheckError, clear_folder
from megatron_dmc.cluster_check.layouts import REFERENCE, all_layouts
from megatron_dmc.cluster_check.report import is_good, make_report, remarks
from tests.support.processes import PRODUCT, started


def test_other_peoples_files_stay(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    kept = tmp_path / "thesis.tex"
    kept.write_text("years of work")
    assert run_alone(cluster_check, "cluster-check", ["--folder", str(tmp_path), "--layouts", "TP2"]) == 1
    assert kept.read_text() == "years of work"
    message = (
        f"cluster-check: --folder {tmp_path} holds other files than a check's; remove them, or name a new folder\n"
    )
    assert capsys.readouterr().err == message
    with pytest.raises(CheckError, match="cannot be written"):
        clear_folder(kept)


@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM, signal.SIGHUP])
def test_an_interrupted_check_leaves_no_process(tmp_path: Path, number: signal.Signals) -> None:
    """torchrun's workers have sessions of their own: ended with torchrun alone, they would run on."""
    folder = tmp_path / "check"

    def workers() -> list[int]:
        texts = {path.parent.name: path for path in Path("/proc").glob("[0-9]*/cmdline")}
        found = []
        for process, path in texts.items():
            with contextlib.suppress(OSError):
                if f"{WORKER[-1]}\0{folder}".encode() in path.read_bytes():
                    found.append(int(process))
        return found

    def wait_until(condition: Callable[[], bool]) -> None:
        deadline = time.monotonic() + 120
        while not condition() and time.monotonic() < deadline:
            time.sleep(0.1)
        assert condition()

    with started(*PRODUCT, "cluster-check", "--folder", folder, "--layouts", "TP2") as process:
        try:
            # torchrun itself names the folder as well.
            wait_until(lambda: len(workers()) > 2)
            process.send_signal(number)
            assert process.stdout is not None
            assert process.stdout.read() == "megatron-dmc: interrupted\n" and process.wait() == 128 + number
            wait_until(lambda: not workers())
        finally:
            for left in workers():
                os.kill(left, signal.SIGKILL)


def test_an_earlier_check_is_replaced(tmp_path: Path) -> None:
    clear_folder(tmp_path / "check")
    (tmp_path / "check" / "results.json").write_text("{}")
    clear_folder(tmp_path / "check")
    assert [path.name for path in (tmp_path / "check").iterdir()] == [LOG]


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["--layouts", "TP3"], "argument --layouts: invalid choice: 'TP3'"),
        (["--cases", "projection", "banana"], "argument --cases: invalid choice: 'banana'"),
        (["--document", "nowhere.md"], f"argument --document: nowhere.md is no page with a line '{HEADING}'"),
    ],
    ids=["layout", "case", "page"],
)
def test_names_that_are_not_known_are_refused(
    arguments: list[str], message: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    with pytest.raises(SystemExit, match="2"):
        run_alone(cluster_check, "cluster-check", ["--folder", str(tmp_path / "check"), *arguments])
    assert message in capsys.readouterr().err
    assert not (tmp_path / "check").exists()


@pytest.mark.parametrize("processes", range(1, 17))
def test_the_last_layout_divides_the_batch(processes: int) -> None:
    layout = all_layouts(processes)[-1]
    # Micro-batches of 2 samples in a global batch of 8.
    assert 8 % (2 * layout.processes // 4) == 0
    assert layout.processes <= max(processes, 8)


def test_fp8_is_named_where_it_was_wanted_and_cannot_run(tmp_path: Path) -> None:
    assert cases_here() == CASES
    assert cases_not_here() == {"FP8": "Transformer Engine is not installed"}
    reference = [layout for layout in all_layouts() if layout.name == REFERENCE]
    report = make_report(tmp_path, reference, [], {}, {}, cases_not_here())
    assert remarks(report) == ["FP8 was not run: Transformer Engine is not installed"]
    assert is_good(report)


def test_the_last_line_says_whether_all_agrees(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    words = ["--folder", str(tmp_path / "check"), "--layouts", "micro-batch 1", "--cases", "projection"]
    assert run_alone(cluster_check, "cluster-check", words) == 0
    said = capsys.readouterr().out
    last = said.splitlines()[-1]
    agree = r"1 layout x 1 case agree with one process: largest difference \d\.\de-\d\d in fp32 \(tolerance 2e-05\)"
    assert re.fullmatch(agree, last), said
    assert "FP8" not in said
