"""Why a path is not what a command needs, in words that follow its name in an error's one line; and who is at work in it."""

import errno
import fcntl
import io
import os
import re
import secrets
import socket
import stat
from pathlib import Path
from typing import TextIO

# What :func:`why_no_file` says of a path where there is nothing.
ABSENT = "does not exist"
# Bytes of a name and of a path, on Linux: NAME_MAX, and PATH_MAX without its closing NUL.
LONGEST_NAME, LONGEST_PATH = 255, 4095
# Bytes that a name's temporary form may add to it: ".tmp-", a process's number, ".mask.idx".
_TEMPORARY = 24
# Of a :class:`Claim`, which writes into it: a name that nobody else gives a file.
LOCK = ".megatron_dmc.lock"

_KINDS = (
    (stat.S_ISREG, "a file"),
    (stat.S_ISDIR, "a folder"),
    (stat.S_ISFIFO, "a named pipe"),
    (stat.S_ISSOCK, "a socket"),
)


def why_no_file(path: Path) -> str | None:
    """Why a path cannot be read as a file: "does not exist", "is a folder, not a file", "cannot be read: Permission denied".

    A pipe and a device are no files: they may keep a reader waiting, and can be read once only. They are not opened.

    Returns:
        None where it can be read.
    """
    return _why_not(path, is_folder=False)


def why_no_folder(path: Path) -> str | None:
    """:func:`why_no_file` of a folder, which is to be listed."""
    return _why_not(path, is_folder=True)


def is_too_long(path: str, added: int = 0) -> bool:
    """Whether a path, or a name in it, has more bytes than it may have once so many are added to it."""
    whole = os.fsencode(path)
    return max(map(len, whole.split(b"/"))) + added > LONGEST_NAME or len(whole) + added > LONGEST_PATH


# A folder with a file of this name is a checkpoint.
CHECKPOINT_MARK = "dmc.json"


def why_nothing_new(path: Path) -> str | None:
    """Why nothing can be made at a path, folders that it lies in included; a whole clause. None where it can."""
    if is_too_long(str(path), _TEMPORARY):
        return (
            f"{str(path)[:30]}... is too long: one name may have {LONGEST_NAME - _TEMPORARY} bytes, a path "
            f"{LONGEST_PATH - _TEMPORARY}"
        )
    for parent in path.parents:
        if os.path.lexists(parent):
            if not parent.is_dir():
                return f"{parent} {_is_something_else(parent, 'a folder')}"
            if not os.access(parent, os.W_OK | os.X_OK, effective_ids=True):
                return f"{parent} may not be written to"
            break
    return why_in_a_checkpoint(path)


def why_in_a_checkpoint(path: Path) -> str | None:
    """A whole clause where a path lies in a checkpoint's folder, however deep; None where it does not."""
    if (around := checkpoint_around(path)) is not None:
        return f"{around} is a checkpoint (it holds {CHECKPOINT_MARK}), which nothing else may be written into"
    return None


def checkpoint_around(path: Path) -> Path | None:
    """The checkpoint whose folder a path lies in, however deep; of a link the place that it leads to counts."""
    return next(
        (parent for parent in Path(os.path.realpath(path)).parents if os.path.lexists(parent / CHECKPOINT_MARK)), None
    )


def left_by_killed_processes(prefix: Path) -> list[Path]:
    """What lies beside an output under the temporary names of processes that are no longer on this machine.

    Such a name is the output's own and ``.tmp-`` with a process's number, and perhaps a suffix of a dataset. Another machine
    may write there now: they are to be named to the user, not to be removed.
    """
    name = re.compile(re.escape(prefix.name) + r"\.tmp-(\d+)(?:\.\w+)*", re.ASCII)
    try:
        found = sorted(prefix.parent.iterdir())
    except OSError:
        return []
    return [path for path in found if (match := name.fullmatch(path.name)) and not _is_running(match[1])]


def _is_running(process: str) -> bool:
    try:
        os.kill(int(process), 0)
    except (ProcessLookupError, OverflowError, ValueError):
        return False
    except PermissionError:
        pass
    return True


class Claim:
    """Keeps other processes out of a folder until it is closed; that of a process which is killed ends with it.

    Where the storage has no locks it keeps nobody out. A process does not keep itself out, and has one claim of a folder at a
    time: the lock goes when the first of several is closed.

    Args:
        folder: made if absent.

    Attributes:
        problem: who has the folder, and what to do; a whole clause. None: this claim has it.
    """

    def __init__(self, folder: Path) -> None:
        folder.mkdir(parents=True, exist_ok=True)
        path = folder / LOCK
        self.problem: str | None = None
        try:
            self._file = _own_file(path)
        except OSError as error:
            self._file = io.StringIO()
            self.problem = f"{path} is not the lock of a run ({error.strerror}); remove it, or name another folder"
            return
        try:
            # A process's own: a child that has the file open does not keep it.
            fcntl.lockf(self._file, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except (BlockingIOError, PermissionError):
            self._file.seek(0)
            holder = self._file.read(200).strip() or "another process"
            self._file.close()
            self.problem = (
                f"{folder} is in use by {holder}; wait until that run has ended, or name another folder (if it is gone, "
                f"remove {path})"
            )
        except OSError:
            pass
        else:
            self._file.truncate(0)
            self._file.write(f"process {os.getpid()} on {socket.gethostname()}\n")
            self._file.flush()

    def close(self) -> None:
        """Lets others in."""
        self._file.close()


def _own_file(path: Path) -> TextIO:
    """To be read and written; made if absent. A link is not followed, and nothing but a file is opened."""
    descriptor = os.open(path, os.O_RDWR | os.O_CREAT | os.O_NOFOLLOW | os.O_NONBLOCK | os.O_CLOEXEC, 0o666)
    if not stat.S_ISREG(os.fstat(descriptor).st_mode):
        os.close(descriptor)
        raise OSError(errno.EINVAL, "it is no file")
    return open(descriptor, "r+", encoding="utf-8", errors="replace")


def why_no_checkpoint(folder: Path) -> str | None:
    """Why a path is not one checkpoint's folder, and what to do; a whole clause. None where it is one.

    What the folder holds is not checked.
    """
    problem = why_no_folder(folder)
    if problem == ABSENT:
        return f"checkpoint {folder} {problem}"
    if problem is not None:
        return f"{folder} {problem}; name the folder of one checkpoint, such as DIRECTORY/final"
    if os.path.lexists(folder / CHECKPOINT_MARK):
        return None
    if (folder / "adapter.safetensors").is_file():
        return f"{folder} is an adapter that was exported; name the checkpoint that it was made from"
    if (folder / "config.json").is_file():
        return (
            f"{folder} is a Hugging Face model, not a checkpoint of megatron_dmc: run megatron-dmc convert-from-hf {folder} "
            "BASE first, and name BASE"
        )
    for several, what in ((folder, "a folder of checkpoints"), (folder / "checkpoints", "the folder of a run")):
        if (checkpoint := checkpoint_below(several)) is not None:
            return f"{folder} is {what}; name one checkpoint, such as {checkpoint}"
    for several in (folder, folder / "checkpoints"):
        if names := sorted({path.parent.parent.name for path in several.glob(f"*/*/{CHECKPOINT_MARK}")}):
            return (
                f"{several} holds folders of checkpoints ({', '.join(names)}); name one, such as {several / names[0]}"
            )
    return (
        f"{folder} is not a checkpoint of megatron_dmc, or not whole: {CHECKPOINT_MARK} is missing; "
        "name one checkpoint, such as DIRECTORY/final"
    )


def checkpoints_in(folder: Path) -> list[Path]:
    """The checkpoints in a folder, by name."""
    return sorted(path.parent for path in folder.glob(f"*/{CHECKPOINT_MARK}") if not path.parent.name.startswith("."))


def checkpoint_below(folder: Path) -> Path | None:
    """A checkpoint of those in a folder, ``final`` if it is there; None where there is none."""
    found = checkpoints_in(folder)
    return folder / "final" if folder / "final" in found else next(reversed(found), None)


def is_full_disk(error: BaseException) -> bool:
    """Whether a write failed for want of space: the disk's, a quota's, or a limit of the process.

    numpy gives no reason, it says only that fewer values were written than it had.
    """
    return isinstance(error, OSError) and (
        error.errno in (errno.ENOSPC, errno.EDQUOT, errno.EFBIG)
        or re.fullmatch(r"\d+ requested and \d+ written", str(error)) is not None
    )


def _why_not(path: Path, *, is_folder: bool) -> str | None:
    wanted = "a folder" if is_folder else "a file"
    try:
        if _kind(path) != wanted:
            return _is_something_else(path, wanted)
        if is_folder:
            os.scandir(path).close()
        else:
            path.open("rb").close()
    except (FileNotFoundError, NotADirectoryError):
        return _is_something_else(path, wanted) if path.is_symlink() else ABSENT
    except OSError as error:
        return f"cannot be read: {error.strerror}"
    return None


def write_whole(path: Path, content: str | bytes) -> None:
    """Writes the whole file or none, also where the power fails; a file that is there keeps its mode."""
    temporary = path.with_name(f".{path.name}.{secrets.token_hex(4)}.tmp")
    try:
        # A new one: what somebody has put there, a link perhaps, is not written to.
        with temporary.open("xb") as file:
            if path.exists():
                os.fchmod(file.fileno(), stat.S_IMODE(path.stat().st_mode))
            file.write(content.encode() if isinstance(content, str) else content)
            file.flush()
            os.fsync(file.fileno())
        temporary.replace(path)
    finally:
        temporary.unlink(missing_ok=True)


def _is_something_else(path: Path, wanted: str) -> str:
    if path.is_symlink() and not path.exists():
        return f"is a link to {os.readlink(path)}, which does not exist"
    return f"is {_kind(path)}, not {wanted}"


def _kind(path: Path) -> str:
    mode = path.stat().st_mode
    return next((name for is_kind, name in _KINDS if is_kind(mode)), "a device")
