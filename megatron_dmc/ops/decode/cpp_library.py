"""The C++ of cpp_source.py, compiled for this machine when it is first needed and kept for the next time."""

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
FLAGS = ("-std=c++17", "-O3", "-march=native", "-fno-math-errno", "-fno-trapping-math", "-fopenmp", "-fPIC", "-shared")
SECONDS = 120

_C_TYPES: dict[str, Any] = {"address": ctypes.c_void_p, "number": ctypes.c_int64, "real": ctypes.c_double}


class StepFields(ctypes.Structure):
    """What a step is told; cpp.py fills it."""

    _fields_ = [(name, _C_TYPES[kind]) for name, kind in FIELDS]


@functools.cache
def library() -> ctypes.CDLL | None:
    """None, and one warning: it cannot be had here."""
    try:
        found = ctypes.CDLL(str(_compiled()))
        for name in ("step", "take_in"):
            function = getattr(found, f"megatron_dmc_{name}")
            function.argtypes, function.restype = [ctypes.POINTER(StepFields)], None
        found.megatron_dmc_kept_after.argtypes = [ctypes.POINTER(StepFields), ctypes.c_void_p]
        found.megatron_dmc_kept_after.restype = None
        found.megatron_dmc_step_size.restype = ctypes.c_int64
        if found.megatron_dmc_step_size() != ctypes.sizeof(StepFields):
            raise OSError("the compiler lays out the step's fields in another way")
    except (OSError, subprocess.SubprocessError, AttributeError) as error:
        warnings.warn(
            f"decoding runs on torch's own operations, which are slower: no C++ could be compiled here ({_told(error)})",
            stacklevel=2,
        )
        return None
    return found


def _told(error: Exception) -> str:
    """In one line."""
    said = getattr(error, "stderr", None) or str(error)
    lines = [line for line in said.splitlines() if line.strip()]
    return next((line for line in lines if "error" in line), lines[0] if lines else type(error).__name__)


def _compiled() -> Path:
    compiler = shlex.split(os.environ.get("CXX", "")) or [_found("c++", "g++", "clang++")]
    version = _run([*compiler, "--version"])
    # A home folder may be seen from machines of several kinds.
    identity = "\0".join([SOURCE, *FLAGS, *compiler, version, platform.machine(), _processor()])
    name = f"decode-{hashlib.sha256(identity.encode()).hexdigest()[:20]}.so"
    folder = _folder()
    if not (folder / name).exists():
        with tempfile.TemporaryDirectory(dir=folder) as scratch:
            source, made = Path(scratch) / "decode.cpp", Path(scratch) / name
            source.write_text(SOURCE, encoding="utf-8")
            _run([*compiler, *FLAGS, str(source), "-o", str(made)])
            os.replace(made, folder / name)
    return folder / name


def _found(*names: str) -> str:
    for name in names:
        if path := shutil.which(name):
            return path
    raise OSError("there is no C++ compiler; install g++")


def _run(command: list[str]) -> str:
    run = subprocess.run(command, capture_output=True, text=True, check=True, timeout=SECONDS, stdin=subprocess.DEVNULL)
    return run.stdout


def _folder() -> Path:
    """The user's cache; if it is not theirs alone or cannot be written to, a folder of this process."""
    base = os.environ.get("XDG_CACHE_HOME") or os.path.expanduser("~/.cache")
    folder = Path(base) / "megatron_dmc"
    try:
        folder.mkdir(mode=0o700, parents=True, exist_ok=True)
        status = folder.stat()
        if status.st_uid == os.getuid() and not status.st_mode & 0o022 and os.access(folder, os.W_OK):
            return folder
    except OSError:
        pass
    return Path(_scratch().name)


@functools.cache
def _scratch() -> "tempfile.TemporaryDirectory[str]":
    """Kept until the process ends."""
    return tempfile.TemporaryDirectory(prefix="megatron_dmc-")


def _processor() -> str:
    """What -march=native depends on."""
    try:
        lines = Path("/proc/cpuinfo").read_text(encoding="utf-8").splitlines()
    except OSError:
        return platform.processor()
    wanted = ("model name", "flags", "Features", "CPU part")
    return "\n".join(sorted({line for line in lines if line.startswith(wanted)}))
