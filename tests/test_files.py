"""What a path is instead of what a command needs."""

import errno
import fcntl
import os
import socket
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import numpy
import pytest

from megatron_dmc.files import (
    ABSENT,
    LOCK,
    Claim,
    is_full_disk,
    left_by_killed_processes,
    why_no_file,
    why_no_folder,
    why_nothing_new,
)
from tests.support.processes import at_work_in
from tests.support.texts import full_disk, without_privileges


@pytest.fixture(autouse=True)
def paths(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    """One path of every kind, in the working folder."""
    monkeypatch.chdir(tmp_path)
    tmp_path.chmod(0o755)
    Path("file").write_text("a")
    Path("folder").mkdir()
    os.mkfifo("pipe")
    Path("broken").symlink_to("gone")
    Path("loop").symlink_to("loop")
    Path("link").symlink_to("file")
    Path("hidden").write_text("a")
    Path("hidden").chmod(0)
    Path("closed").mkdir(mode=0)
    with socket.socket(socket.AF_UNIX) as server:
        server.bind("socket")
        yield


@pytest.mark.parametrize(
    ("name", "no_file", "no_folder"),
    [
        ("file", None, "is a file, not a folder"),
        ("link", None, "is a file, not a folder"),
        ("folder", "is a folder, not a file", None),
        ("gone", ABSENT, ABSENT),
        ("file/inner", ABSENT, ABSENT),
        ("pipe", "is a named pipe, not a file", "is a named pipe, not a folder"),
        ("socket", "is a socket, not a file", "is a socket, not a folder"),
        ("/dev/null", "is a device, not a file", "is a device, not a folder"),
        ("broken", "is a link to gone, which does not exist", "is a link to gone, which does not exist"),
        *[("loop", *["cannot be read: Too many levels of symbolic links"] * 2)],
        *[("a" * 300, *["cannot be read: File name too long"] * 2)],
        ("hidden", "cannot be read: Permission denied", "is a file, not a folder"),
        ("closed", "is a folder, not a file", "cannot be read: Permission denied"),
        ("closed/inner", "cannot be read: Permission denied", "cannot be read: Permission denied"),
    ],
)
def test_what_a_path_is(name: str, no_file: str | None, no_folder: str | None) -> None:
    with without_privileges():
        assert (why_no_file(Path(name)), why_no_folder(Path(name))) == (no_file, no_folder)


@pytest.mark.parametrize(
    ("name", "problem"),
    [
        ("file/new", "file is a file, not a folder"),
        ("file/deep/new", "file is a file, not a folder"),
        ("link/new", "link is a file, not a folder"),
        ("broken/new", "broken is a link to gone, which does not exist"),
        ("pipe/new", "pipe is a named pipe, not a folder"),
        ("/dev/null/new", "/dev/null is a device, not a folder"),
        ("folder/deep/new", None),
        ("new", None),
        ("file", None),
    ],
)
def test_where_nothing_new_can_be_made(name: str, problem: str | None) -> None:
    assert why_nothing_new(Path(name)) == problem


@pytest.mark.parametrize("name", ["closed/new", "closed/deep/new"])
def test_a_folder_that_may_not_be_written_to(name: str) -> None:
    with without_privileges():
        assert why_nothing_new(Path(name)) == "closed may not be written to"


def test_nothing_new_is_made_inside_a_checkpoint() -> None:
    Path("folder/dmc.json").touch()
    Path("way").symlink_to("folder")
    problem = f"{Path('folder').resolve()} is a checkpoint (it holds dmc.json), which nothing else may be written into"
    for name in ("folder/new", "folder/deep/new", "way/new", "gone/../folder/new"):
        assert why_nothing_new(Path(name)) == problem
    # A checkpoint itself may be replaced, and stands beside others.
    assert why_nothing_new(Path("folder")) is None
    assert why_nothing_new(Path("folder2/new")) is None


def test_names_that_are_too_long() -> None:
    """Shorter than what a disk takes by what a temporary name adds."""
    assert why_nothing_new(Path("x" * 231)) is None
    long = "... is too long: one name may have 231 bytes, a path 4071"
    for name in ("x" * 232, "folder/" + "x" * 300, "\u00e4" * 116, "x/" * 2100):
        problem = why_nothing_new(Path(name))
        assert problem is not None and problem.endswith(long)


def no_locks(*_: object) -> None:
    raise OSError(errno.ENOLCK, "No locks available")


def test_one_run_has_a_folder(monkeypatch: pytest.MonkeyPatch) -> None:
    """Until it closes its claim, or is killed."""
    with at_work_in(Path("folder")) as process:
        problem = Claim(Path("folder")).problem
        assert problem is not None
        assert (
            problem.startswith(f"folder is in use by process {process.pid} on ") and f"remove folder/{LOCK}" in problem
        )
        with monkeypatch.context() as patch:
            patch.setattr(fcntl, "lockf", no_locks)
            assert Claim(Path("folder")).problem is None
        assert Claim(Path("folder")).problem is not None
        process.kill()
    claim = Claim(Path("folder"))
    assert claim.problem is None
    claim.close()
    claim.close()
    assert Claim(Path("new/deep")).problem is None


def test_a_lock_that_is_not_a_runs(tmp_path: Path) -> None:
    precious, lock = tmp_path / "precious", tmp_path / "run" / LOCK
    precious.write_text("years of work")
    lock.parent.mkdir()
    makers = {
        "Is a directory": lock.mkdir,
        "it is no file": lambda: os.mkfifo(lock),
        "Too many levels of symbolic links": lambda: lock.symlink_to(precious),
    }
    for why, make in makers.items():
        make()
        problem = f"{lock} is not the lock of a run ({why}); remove it, or name another folder"
        claim = Claim(lock.parent)
        assert claim.problem == problem
        claim.close()
        lock.rmdir() if lock.is_dir() else lock.unlink()
    assert precious.read_text() == "years of work"
    with at_work_in(lock.parent):
        lock.write_bytes(b"\xff\xfe")
        assert "is in use by" in str(Claim(lock.parent).problem)


def test_what_killed_processes_left() -> None:
    """Only an output's own names, with the number of a process that has ended."""
    with subprocess.Popen([sys.executable, "-c", ""]) as process:
        pass
    gone, here = process.pid, os.getpid()
    left = [f"text.tmp-{gone}", f"text.tmp-{gone}.bin", f"text.tmp-{gone}.mask.idx", f"text.tmp-{'9' * 400}"[:200]]
    others = [f"text.tmp-{here}.bin", f"text2.tmp-{gone}.bin", f"text_valid.tmp-{gone}", f"a_text.tmp-{gone}"]
    others += ["text.tmp-", "text.tmp-1x", f"text.tmp-{gone}~", f"textXtmp-{gone}", "text.bin", f"text.tmp-{gone}-a"]
    for name in (*left, *others):
        Path("folder", name).touch()
    assert {path.name for path in left_by_killed_processes(Path("folder/text"))} == set(left)
    assert left_by_killed_processes(Path("gone/text")) == []


def test_numpy_on_a_full_disk() -> None:
    with full_disk(1000), pytest.raises(OSError) as caught:
        numpy.save("array.npy", numpy.zeros(10_000))
    assert is_full_disk(caught.value)
    assert not is_full_disk(OSError("something else"))
