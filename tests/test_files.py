"""What a path is instead of what a command needs."""

import os
import socket
from collections.abc import Iterator
from pathlib import Path

import pytest

from megatron_dmc.files import ABSENT, why_no_file, why_no_folder, why_nothing_new
from tests.support.texts import without_privileges


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
