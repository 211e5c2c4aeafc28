"""What the numbers are measured on, and which attention kernel torch picks here."""

import platform
import subprocess
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path

import common
import torch
from torch.nn.attention import SDPBackend

from gpu.run import Run
from gpu.sizes import DTYPE

PACKAGES = (
    "torch",
    "triton",
    "megatron-core",
    "transformer-engine",
    "transformers",
    "flash-attn",
    "numpy",
    "omegaconf",
)


def card(device: str) -> str:
    """The GPU by name; at toy size, that there is none."""
    if device == "cuda":
        return torch.cuda.get_device_name()
    return f"no GPU: toy sizes on a CPU ({common.machine()['processor']})"


def environment(run: Run) -> None:
    run.row("note", python=platform.python_version(), **{name: _version(name) for name in PACKAGES}, commit=_commit())
    run.row("note", cuda=torch.version.cuda, cudnn=torch.backends.cudnn.version(), **common.machine())
    if run.device == "cuda":
        run.attempt("the card", lambda: _card_row(run))
    run.attempt("the attention kernel that torch picks", lambda: _picked_kernel(run))


def _card_row(run: Run) -> None:
    properties = torch.cuda.get_device_properties(0)
    free, total = torch.cuda.mem_get_info()
    run.row(
        "note",
        card=properties.name,
        capability=f"{properties.major}.{properties.minor}",
        processors=properties.multi_processor_count,
        free_gib=round(free / 2**30, 1),
        total_gib=round(total / 2**30, 1),
        gpus=torch.cuda.device_count(),
    )


def _picked_kernel(run: Run) -> None:
    """For plain causal attention; the benchmarks elsewhere call whatever this is."""
    sizes = run.sizes
    query, key = (
        torch.zeros(1, heads, 1024, sizes.head_dim, device=run.device, dtype=DTYPE)
        for heads in (sizes.heads, sizes.kv_heads)
    )
    for enable_gqa, keys in ((True, key), (False, query)):
        number = torch._fused_sdp_choice(query, keys, keys, None, 0.0, True, enable_gqa=enable_gqa)
        names = {int(backend): name for name, backend in SDPBackend.__members__.items()}
        run.row("note", picked=names.get(int(number), number), shared_kv_heads=enable_gqa)


def _version(package: str) -> str | None:
    try:
        return version(package)
    except PackageNotFoundError:
        return None


def _commit() -> str | None:
    """Of this checkout; None where it came without its history."""
    command = ["git", "-C", str(Path(__file__).parent), "rev-parse", "--short", "HEAD"]
    try:
        return subprocess.run(command, capture_output=True, text=True, check=True, timeout=10).stdout.strip()
    except (OSError, subprocess.SubprocessError):
        return None
