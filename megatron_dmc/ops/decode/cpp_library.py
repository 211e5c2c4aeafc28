"""The C++ of cpp_source.py, compiled for this machine when it is first needed and kept for the next time."""

import contextlib
import ctypes
import functools
import hashlib
import os
import platform
import shlex
import shutil
import subprocess
import tempfile
import warnings
from pathlib import Path
from typing import Any

from megatron_dmc.ops.decode.cpp_source import FIELDS, SOURCE

# A reduction's order may change in loops that are marked for it; nothing else of -ffast-math.
FLAGS = ("-std=c++17", "-O3", "-march=native", "-fno-math-errno", "-fno-trapping-math", "-fPIC", "-shared")
THREADS = "-fopenmp"
SECONDS = 120

_C_TYPES: dict[str, Any] = {"address": ctypes.c_void_p, "number": ctypes.c_int64, "real": ctypes.c_double}


class StepFields(ctypes.Structure):
    """What a step is told; cpp.py fills it."""

    _fields_ = [(name, _C_TYPES[kind]) for name, kind in FIELDS]


def library() -> ctypes.CDLL | None:
    """None, and one warning: it cannot be had here."""
    found, reason = _library()
    if found is None:
        _warn_once(reason)
    return found


@functools.cache
def _warn_once(reason: str) -> None:
    warnings.warn(
        f"decoding runs on torch's own operations, which are slower: no C++ could be compiled here ({reason})",
        stacklevel=3,
    )


@functools.cache
def _library() -> tuple[ctypes.CDLL | None, str]:
    """It, or why there is none."""
    reason = ""
    # The folder may be full or may not be run from, where another can.
    for find in (_folder, _scratch):
        try:
            if (folder := find()) is not None:
                return _loaded(folder), ""
        except (OSError, subprocess.SubprocessError, ValueError, AttributeError) as error:
            reason = _told(error)
    return None, reason


def _told(error: Exception) -> str:
    """In one line."""
    said = getattr(error, "stderr", None) or str(error)
    if isinstance(said, bytes):
        said = said.decode(errors="replace")
    lines = [line for line in said.splitlines() if line.strip()]
    telling = (line for mark in ("No space left", "error") for line in lines if mark in line)
    return next(telling, lines[0] if lines else type(error).__name__)


def _loaded(folder: Path) -> ctypes.CDLL:
    """From the folder, where it is compiled if it is not there or not whole."""
    compiler = shlex.split(os.environ.get("CXX", "")) or [_found("c++", "g++", "clang++")]
    version = _run([*compiler, "--version"])
    # A home folder may be seen from machines of several kinds.
    identity = "\0".join([SOURCE, *FLAGS, *compiler, version, platform.machine(), _processor()])
    name = f"decode-{hashlib.sha256(identity.encode()).hexdigest()[:20]}"
    for kept in folder.glob(f"{name}-*.so"):
        # One that is cut off would end the process when it is read.
        if kept.stem == f"{name}-{kept.stat().st_size}":
            with contextlib.suppress(OSError, AttributeError):
                return _checked(kept)
    with tempfile.TemporaryDirectory(dir=folder) as scratch:
        made = _compiled(compiler, Path(scratch))
        found = _checked(made)
        with made.open("rb") as file:
            os.fsync(file.fileno())
        os.replace(made, folder / f"{name}-{made.stat().st_size}.so")
    return found


def _compiled(compiler: list[str], folder: Path) -> Path:
    source, made = folder / "decode.cpp", folder / "decode.so"
    source.write_text(SOURCE, encoding="utf-8")
    command = [*compiler, *FLAGS, str(source), "-o", str(made)]
    try:
        _run([*command, THREADS])
        _checked(made)
    except (OSError, subprocess.CalledProcessError):
        _run(command)  # a compiler without OpenMP
    return made


def _checked(path: Path) -> ctypes.CDLL:
    found = ctypes.CDLL(str(path))
    for name in ("step", "take_in"):
        function = getattr(found, f"megatron_dmc_{name}")
        function.argtypes, function.restype = [ctypes.POINTER(StepFields)], None
    found.megatron_dmc_kept_after.argtypes = [ctypes.POINTER(StepFields), ctypes.c_void_p]
    found.megatron_dmc_kept_after.restype = None
    found.megatron_dmc_step_size.restype = ctypes.c_int64
    if found.megatron_dmc_step_size() != ctypes.sizeof(StepFields):
        raise OSError("the compiler lays out the step's fields in another way")
    return found


def _found(*names: str) -> str:
    for name in names:
        if path := shutil.which(name):
            return path
    raise OSError("there is no C++ compiler; install g++")


def _run(command: list[str]) -> str:
    run = subprocess.run(
        command,
        capture_output=True,
        text=True,
        errors="replace",
        check=True,
        timeout=SECONDS,
        stdin=subprocess.DEVNULL,
    )
    return run.stdout


def _folder() -> Path | None:
    """The user's cache, if nobody else may write to it; one that an administrator has filled may be read-only."""
    base = Path(os.environ.get("XDG_CACHE_HOME") or os.path.expanduser("~/.cache"))
    folder = base / "megatron_dmc"
    if not base.is_absolute():
        return None
    try:
        with contextlib.suppress(OSError):
            folder.mkdir(mode=0o700, parents=True, exist_ok=True)
        status = folder.stat()
    except OSError:
        return None
    return folder if folder.is_dir() and status.st_uid in (0, os.getuid()) and not status.st_mode & 0o022 else None


@functools.cache
def _scratch_folder() -> "tempfile.TemporaryDirectory[str]":
    """Kept until the process ends."""
    return tempfile.TemporaryDirectory(prefix="megatron_dmc-")


def _scratch() -> Path:
    return Path(_scratch_folder().name)


def _processor() -> str:
    """What -march=native depends on."""
    try:
        lines = Path("/proc/cpuinfo").read_text(encoding="utf-8").splitlines()
    except OSError:
        return platform.processor()
    wanted = ("model name", "flags", "Features", "CPU part")
    return "\n".join(sorted({line for line in lines if line.startswith(wanted)}))
