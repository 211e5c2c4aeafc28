"""The command: what it answers without torch, and how an error becomes a line and an exit status."""

import argparse
import errno
import os
import pty
import re
import signal
import subprocess
import sys
import threading
from collections.abc import Callable
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest

from megatron_dmc import ConfigError, DMCError, __version__
from megatron_dmc.checkpoint import CheckpointError
from megatron_dmc.cli import run_alone
from megatron_dmc.cli.command import COMMANDS, INTERRUPTED, PIPE_CLOSED, main
from megatron_dmc.cluster_check.launch import CheckError
from megatron_dmc.training.trainer import TrainingError
from tests.support.processes import ROOT

RECIPE = ROOT / "examples" / "llama2_70b_dmc8" / "recipe.yaml"
TOOLS = ("hf_to_megatron.py", "megatron_to_hf.py", "preprocess_data.py")

# Runs a program's lines, then says on the last line of stderr whether torch was imported.
WITHOUT_TORCH = """
import sys
try:
    {program}
finally:
    print("torch" in sys.modules, file=sys.stderr)
"""


def python(*arguments: str, cwd: Path | None = None, **environment: str) -> subprocess.CompletedProcess[str]:
    command = [sys.executable, *arguments]
    variables = {**os.environ, **environment}
    return subprocess.run(command, cwd=cwd, env=variables, capture_output=True, text=True, timeout=120)


def answers_without_torch(*arguments: str) -> subprocess.CompletedProcess[str]:
    program = f"from megatron_dmc.cli import main; sys.exit(main({list(arguments)!r}))"
    done = python("-c", WITHOUT_TORCH.format(program=program))
    *said, imported = done.stderr.splitlines()
    assert imported == "False", done.stderr
    return subprocess.CompletedProcess(done.args, done.returncode, done.stdout, "\n".join(said))


def failing(raises: Callable[[], Any]) -> Any:
    """A command that does this and nothing else."""

    def run(options: argparse.Namespace) -> None:
        raises()

    return SimpleNamespace(HELP="", add_arguments=lambda parser: None, run=run)


def throw(error: BaseException) -> Any:
    def raises() -> None:
        raise error

    return failing(raises)


def test_help_needs_no_torch() -> None:
    listed = answers_without_torch("--help").stdout
    for name, command in COMMANDS.items():
        assert (f"  {name} " in listed or f"  {name}\n" in listed) == bool(command.HELP), name
    done = python("-c", WITHOUT_TORCH.format(program="from megatron_dmc.cli import command"))
    assert done.stderr == "False\n"


def test_a_wrong_name_is_told_the_commands_of_the_help(capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit, match="2"):
        main(["bogus"])
    named = re.findall(r"'?([\w-]+)'?(?:, |\))", capsys.readouterr().err.partition("choose from ")[2])
    assert named == [name for name, command in COMMANDS.items() if command.HELP]


def test_a_runs_folder_points_to_its_checkpoints(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    final = tmp_path / "checkpoints" / "final"
    final.mkdir(parents=True)
    (final / "dmc.json").touch()
    for command in (["inspect"], ["generate", "--prompt", "a"]):
        assert main([*command, str(tmp_path)]) == 1
        line = f"megatron-dmc: {tmp_path} is the folder of a run; name one checkpoint, such as {final}\n"
        assert capsys.readouterr().err == line


@pytest.mark.parametrize("name", COMMANDS)
def test_every_command_has_help(name: str, capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit, match="0"):
        main([name, "--help"])
    said = capsys.readouterr().out
    first = (COMMANDS[name].run.__doc__ or "").split()[0]
    assert said.startswith(f"usage: megatron-dmc {name}") and first in said


@pytest.mark.parametrize(
    ("arguments", "status", "message"),
    [
        (["retrofit"], 2, "the following arguments are required: recipe"),
        (["bogus"], 2, "invalid choice: 'bogus'"),
        (["inspect", "x", "--tokens", "9" * 400], 1, "--tokens must be <= 2147483647, got 9999999999... (400 digits)"),
        (["inspect", "x", "--tokens", "9" * 5000], 2, "invalid int value: '9999999999... (5000 digits)'"),
        (
            ["inspect", str(RECIPE)],
            1,
            f"megatron-dmc: {RECIPE} is a file, not a folder; name the folder of one checkpoint",
        ),
        (["generate", str(RECIPE), "--prompt", "a"], 1, f"megatron-dmc: {RECIPE} is a file, not a folder"),
        (
            ["generate", "x", "--prompt", "a", "--temperature", "nan"],
            1,
            "--temperature (other than 0, which is greedy) must",
        ),
        (["generate", "x", "--prompt", "a", "--temperature", "1e308"], 1, "must be <= 1000, got 1e+308"),
        (["plan", str(RECIPE), "--nodes", "9" * 30], 2, "megatron-dmc: --nodes must be <= 1000000, got "),
        (
            ["plan", str(RECIPE), "--nodes", "1", "--mfu", "nan"],
            2,
            "megatron-dmc: --mfu must be a finite number, got nan",
        ),
        *(
            (
                ["preprocess", "--input", "a", "--tokenizer", "b", "--output", "c", f"--valid-fraction={value}"],
                2,
                message,
            )
            for value, message in (
                ("1", "argument --valid-fraction: must be in [0, 1), got 1;"),
                ("-0.1", "argument --valid-fraction: must be in [0, 1), got -0.1;"),
                ("nan", "argument --valid-fraction: must be in [0, 1), got nan;"),
                ("x", "argument --valid-fraction: invalid fraction value: 'x'"),
            )
        ),
        *(
            (
                ["preprocess", "--input", "a", "--output", "c", f"--train-tokenizer={value}"],
                2,
                "argument --train-tokenizer: must be a whole number from 257 (256 bytes and the end of a text) to 16777216, "
                f"got {value};",
            )
            for value in (0, 256, -3, 2**24 + 1)
        ),
        *(
            (
                ["preprocess", "--input", "a", "--tokenizer", "b", "--output", f"d/{name}"],
                2,
                f"argument --output: .bin and .idx are added to d/{name}; name it d/{better};",
            )
            for name, better in (("x.bin", "x"), ("x.idx", "x"), ("x.bin.idx", "x"), (".bin", "train"))
        ),
        (
            ["inspect", "x", "--text", "gone.txt"],
            1,
            "megatron-dmc: --text gone.txt does not exist; name a folder, a text",
        ),
        (["report"], 2, "the following arguments are required: RUN"),
        (["report", ""], 2, "argument RUN: an empty path; name a file or a folder"),
        (["report", "gone"], 1, "megatron-dmc: gone does not exist; name the folder of a run, such as runs/quickstart"),
        (["report", str(RECIPE)], 1, f"megatron-dmc: {RECIPE} is a file, not a folder; name the folder of a run"),
        (
            ["report", str(ROOT / "docs")],
            1,
            "docs is no folder of a run: it has no comparison.json, no summary.json and",
        ),
        (["inspect", "x", "--banana"], 2, "unrecognized arguments: --banana"),
        (["retrofit", str(RECIPE), "banana"], 1, "override 'banana' must read section.field=value"),
        (["retrofit", ""], 2, "argument recipe: an empty path; name a file"),
        (["plan", "", "--nodes", "1"], 2, "argument recipe: an empty path; name a file"),
        (["plan", "x", "--nodes", "1", "x=1", "dmc.seed"], 2, "unrecognized arguments: dmc.seed; see"),
        (["retrofit", "x.yaml"], 1, "megatron-dmc: recipe x.yaml does not exist"),
        (["inspect", "x", "--tokens", "1"], 1, "megatron-dmc: --tokens must be >= 2, got 1"),
        (["generate", "x", "--prompt", "a", "--max-new-tokens", "0"], 1, "megatron-dmc: --max-new-tokens must be >= 1"),
        (["convert-to-hf", "x", "y", "--max-shard-size", "5 apples"], 2, "5GB, 300MB"),
        (["cluster-check", "--layouts", "TP3"], 2, "argument --layouts: invalid choice: 'TP3'"),
        *(
            ([*words, folder], 2, message)
            for words in (["cluster-check", "--folder"], ["quickstart", "--output"], ["recipes", "--output"])
            for folder, message in (
                (
                    "",
                    f"argument {words[1]}: an empty path; name a file or a folder (. is the working folder)",
                ),
                (str(RECIPE), f"{RECIPE} is a file, not a folder; name another folder"),
                (str(RECIPE / "below"), f"{RECIPE} is a file, not a folder; name another folder"),
                ("/dev/null", "/dev/null is a device, not a folder; name another folder"),
                ("x" * 256, "xx... is too long: one name may have 231 bytes, a path 4071"),
                ("x/" * 2100, "x/... is too long: one name may have 231 bytes, a path 4071"),
            )
        ),
        (["quickstart", "--data", ""], 2, "argument --data: an empty path"),
        (["inspect", "x", "--text", ""], 2, "argument --text: an empty path"),
        (["plan", str(RECIPE), "--nodes", "0"], 2, "megatron-dmc: --nodes must be >= 1, got 0"),
        (["plan", str(RECIPE), "--nodes", "1", "--gpu", "h20"], 2, "megatron-dmc: --gpu must be one of"),
        (["plan", str(RECIPE), "--nodes", "1", "--gpus-per-node", "3"], 2, "must divide the number of GPUs"),
        (
            ["plan", str(RECIPE), "--nodes", "16", "training.global_batch_size=3"],
            2,
            "must be a multiple of micro_batch",
        ),
        (["plan", str(RECIPE), "--nodes", "1", "training.banana=1"], 2, "banana"),
    ],
)
def test_what_is_refused_is_refused_before_torch_is_imported(arguments: list[str], status: int, message: str) -> None:
    done = answers_without_torch(*arguments)
    assert done.returncode == status and message in done.stderr
    assert "\n" not in done.stderr


def test_versions() -> None:
    said = answers_without_torch("--version").stdout
    assert said.startswith(f"megatron-dmc {__version__} (torch ") and ", megatron-core " in said


@pytest.mark.parametrize("error", [ConfigError, CheckpointError, TrainingError, CheckError])
def test_one_base_class(error: type[Exception]) -> None:
    assert issubclass(error, DMCError)
    assert issubclass(error, ValueError if error is ConfigError else RuntimeError)


@pytest.mark.parametrize(
    ("error", "status", "said"),
    [
        (ConfigError("a.b must be 1, got 2"), 1, "tool: a.b must be 1, got 2\n"),
        (CheckpointError("checkpoint x does not exist"), 1, "tool: checkpoint x does not exist\n"),
        (
            FileNotFoundError(errno.ENOENT, "No such file or directory", "a.txt"),
            1,
            "tool: a.txt: No such file or direc",
        ),
        (PermissionError(errno.EACCES, "Permission denied", b"b.txt"), 1, "tool: b.txt: Permission denied\n"),
        (OSError(errno.ENOSPC, "No space left on device"), 1, "tool: No space left on device; free some space"),
        (KeyboardInterrupt(), INTERRUPTED, "tool: interrupted\n"),
        (KeyboardInterrupt("nothing was written"), INTERRUPTED, "tool: interrupted, nothing was written\n"),
    ],
)
def test_an_error_is_one_line(error: BaseException, status: int, said: str, capsys: pytest.CaptureFixture[str]) -> None:
    assert run_alone(throw(error), "tool.py", []) == status
    line = capsys.readouterr().err
    assert line.startswith(said) and line.count("\n") == 1


@pytest.mark.parametrize("error", [ValueError("ours"), OSError(errno.EBADF, "Bad file descriptor"), RuntimeError("x")])
def test_a_fault_of_the_program_keeps_its_traceback(error: Exception) -> None:
    with pytest.raises(type(error)):
        run_alone(throw(error), "tool.py", [])


ENDING = [signal.SIGTERM, signal.SIGHUP, signal.SIGUSR1]


@pytest.mark.parametrize("number", ENDING)
def test_a_signal_ends_a_command_as_an_interruption_does(
    number: signal.Signals, capsys: pytest.CaptureFixture[str]
) -> None:
    before = signal.signal(number, signal.SIG_DFL)
    try:
        assert run_alone(failing(lambda: os.kill(os.getpid(), number)), "tool.py", []) == 128 + number
        assert capsys.readouterr().err == "tool: interrupted\n"
        assert signal.getsignal(number) == signal.SIG_DFL
    finally:
        signal.signal(number, before)


def test_a_second_signal_does_not_stop_what_cleans_up(tmp_path: Path) -> None:
    def work() -> None:
        try:
            os.kill(os.getpid(), signal.SIGTERM)
        finally:
            os.kill(os.getpid(), signal.SIGHUP)
            os.kill(os.getpid(), signal.SIGTERM)
            (tmp_path / "clean").touch()

    assert run_alone(failing(work), "tool.py", []) == 128 + signal.SIGTERM
    assert (tmp_path / "clean").exists()


def test_under_nohup_a_closed_terminal_ends_nothing() -> None:
    before = signal.signal(signal.SIGHUP, signal.SIG_IGN)
    try:
        assert run_alone(failing(lambda: os.kill(os.getpid(), signal.SIGHUP)), "tool.py", []) == 0
        assert signal.getsignal(signal.SIGHUP) == signal.SIG_IGN
    finally:
        signal.signal(signal.SIGHUP, before)


COMMAND = """
import atexit, os, signal, sys, time
from types import SimpleNamespace
{before}
def run(options):
    {work}
from megatron_dmc.cli import run_alone
sys.exit(run_alone(SimpleNamespace(HELP='', add_arguments=lambda parser: None, run=run), 'tool'))
"""


@pytest.mark.parametrize("number", ENDING)
def test_a_signal_after_the_work_leaves_the_exit_status(number: signal.Signals) -> None:
    # At exit the functions are called that were registered before the command and, before these, within it.
    late = f"atexit.register(os.kill, os.getpid(), {number:d})"
    before = f"signal.signal({number:d}, signal.SIG_DFL); {late}"
    done = python("-c", COMMAND.format(before=before, work=f"{late}; print('done')"))
    assert (done.returncode, done.stdout, done.stderr) == (0, "done\n", "")


def test_a_terminal_that_closes_ends_a_command(tmp_path: Path) -> None:
    """It takes no line any more, neither the command's own nor the one that says that it was interrupted."""
    work = f"""
    try:
        print('begun', flush=True)
        time.sleep(100)
    finally:
        print('not read')
        open({str(tmp_path / "clean")!r}, 'w').close()
    """
    program = COMMAND.format(before="signal.signal(signal.SIGHUP, signal.SIG_DFL)", work=work)
    pid, terminal = pty.fork()
    if pid == 0:
        os.chdir(ROOT)
        os.execv(sys.executable, [sys.executable, "-c", program])
    assert b"begun" in os.read(terminal, 1000)
    os.close(terminal)
    _, status = os.waitpid(pid, 0)
    assert os.waitstatus_to_exitcode(status) == 128 + signal.SIGHUP
    assert (tmp_path / "clean").exists()


def test_a_command_runs_in_a_thread_too() -> None:
    statuses: list[int] = []
    thread = threading.Thread(target=lambda: statuses.append(run_alone(failing(lambda: None), "tool.py", [])))
    thread.start()
    thread.join()
    assert statuses == [0]


@pytest.mark.parametrize("unbuffered", ["", "1"])
@pytest.mark.parametrize("write_line", ["print", "rich.print"])
def test_a_reader_that_has_gone_is_no_fault(write_line: str, unbuffered: str) -> None:
    program = (
        "import sys; import rich; from types import SimpleNamespace; from megatron_dmc.cli import run_alone\n"
        f"def run(options):\n    for _ in range(2000): {write_line}('a long text')\n"
        "sys.exit(run_alone(SimpleNamespace(HELP='', add_arguments=lambda parser: None, run=run), 'tool', []))"
    )
    read, write = os.pipe()
    os.close(read)
    environment = {**os.environ, "PYTHONUNBUFFERED": unbuffered}
    done = subprocess.run([sys.executable, "-c", program], stdout=write, stderr=subprocess.PIPE, env=environment)
    os.close(write)
    assert (done.returncode, done.stderr) == (PIPE_CLOSED, b"")


@pytest.mark.parametrize("tool", TOOLS)
def test_tools_run_from_any_folder_and_without_an_installation(tool: str, tmp_path: Path) -> None:
    # -S: no site-packages, so neither the package nor anything it needs.
    done = python("-S", str(ROOT / "tools" / tool), "--help", cwd=tmp_path, PYTHONPATH="")
    assert done.returncode == 0 and done.stdout.startswith(f"usage: {tool} "), done.stderr


def test_the_modules_are_commands_too() -> None:
    for module in ("megatron_dmc", "megatron_dmc.cluster_check"):
        done = python("-m", module, "--help")
        assert done.returncode == 0 and done.stdout.startswith("usage: "), done.stderr
