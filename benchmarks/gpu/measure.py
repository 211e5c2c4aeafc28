"""Errors against float64, and times, kernels, memory and host waits of one call."""

import functools
import statistics
import time
import warnings
from collections import Counter
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import common
import torch
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode

from gpu.run import Run, error_line

# Relative errors in the Euclidean norm. bf16 has 8 bits: rounding alone gives 2e-3.
OUTPUT_BOUND = 1e-2
GRADIENT_BOUND = 2e-2

Call = Callable[[], object]


def relative_error(got: Tensor, expected: Tensor) -> float:
    """Of the whole tensor, in the Euclidean norm; infinite if anything is not finite."""
    error = (got.double() - expected.double()).norm() / expected.double().norm().clamp(min=1e-12)
    return float(error) if error.isfinite() else float("inf")


def checked(name: str, quantity: str, error: float, bound: float | None) -> dict[str, Any]:
    """A row of kind check; without a bound the error is there to be compared with."""
    return {"check": name, "quantity": quantity, "error": error, "bound": bound, "ok": bound is None or error <= bound}


def with_gradients(function: Callable[..., Any], inputs: Sequence[Tensor]) -> tuple[list[Tensor], list[Tensor]]:
    """Outputs, and the inputs' gradients of a fixed projection of them."""
    leaves = [x.detach().clone().requires_grad_() for x in inputs]
    result = function(*leaves)
    outputs = [result] if isinstance(result, Tensor) else list(result)
    generator = torch.Generator().manual_seed(1)
    directions = [torch.randn(x.shape, generator=generator).to(x.device, x.dtype) for x in outputs]
    torch.autograd.backward(outputs, directions)
    return [x.detach() for x in outputs], [torch.zeros_like(x) if x.grad is None else x.grad for x in leaves]


def compare(
    name: str,
    fast: Callable[..., Any],
    reference: Callable[..., Any],
    inputs: Sequence[Tensor],
    names: Sequence[str],
) -> list[dict[str, Any]]:
    """A row per output and gradient: fast in the inputs' dtype, the reference on the same numbers in float64."""
    outputs, gradients = with_gradients(fast, inputs)
    expected_outputs, expected_gradients = with_gradients(reference, [x.double() for x in inputs])
    rows = [
        checked(name, f"output {i}", relative_error(x, y), OUTPUT_BOUND)
        for i, (x, y) in enumerate(zip(outputs, expected_outputs, strict=True))
    ]
    return rows + [
        checked(name, f"d {label}", relative_error(x, y), GRADIENT_BOUND)
        for label, x, y in zip(names, gradients, expected_gradients, strict=True)
    ]


def backpropagation(function: Callable[..., Any], leaves: Sequence[Tensor], grads: Sequence[Tensor]) -> Call:
    """A call of the function, forward and backward."""
    return lambda: torch.autograd.grad(function(*leaves), leaves, grads, allow_unused=True)


def error_of(call: Call) -> str | None:
    """Why a call does not run here, such as a kernel that this card does not have; None: it runs."""
    try:
        call()
    except RuntimeError as error:
        return error_line(error)
    return None


@dataclass(frozen=True)
class Times:
    """Milliseconds of every round: between two marks in the GPU's queue (on a CPU the wall's), and of the wall."""

    device: list[float]
    wall: list[float]

    def over(self, peer: "Times") -> float:
        """Median over the rounds of this call's time over the peer's in the same round."""
        return statistics.median(a / b for a, b in zip(self.device, peer.device, strict=True))

    def medians(self) -> dict[str, float]:
        return {"ms": round(statistics.median(self.device), 4), "wall_ms": round(statistics.median(self.wall), 4)}


def interleaved(functions: Mapping[str, Call], rounds: int, device: str) -> dict[str, Times]:
    """Each round calls all functions once. One round before the first is not counted."""
    times: dict[str, Times] = {name: Times([], []) for name in functions}
    for counted in [False] + [True] * rounds:
        for name, function in functions.items():
            on_device, wall = _milliseconds(function, device)
            if counted:
                times[name].device.append(on_device)
                times[name].wall.append(wall)
    return times


def _milliseconds(function: Call, device: str) -> tuple[float, float]:
    if device != "cuda":
        begin = time.perf_counter()
        function()
        wall = 1000 * (time.perf_counter() - begin)
        return wall, wall
    start, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))
    torch.cuda.synchronize()
    begin = time.perf_counter()
    start.record()
    function()
    end.record()
    torch.cuda.synchronize()
    return start.elapsed_time(end), 1000 * (time.perf_counter() - begin)


def launches(function: Call, device: str) -> dict[str, Any]:
    """How many kernels and copies one call puts on the GPU, and how long these keep it busy; on a CPU, torch's operators."""
    activity = torch.profiler.ProfilerActivity
    on_gpu = device == "cuda"
    with torch.profiler.profile(activities=[activity.CUDA if on_gpu else activity.CPU]) as profile:
        function()
        if on_gpu:
            torch.cuda.synchronize()
    kind = torch.autograd.DeviceType.CUDA if on_gpu else torch.autograd.DeviceType.CPU
    events = [x for x in profile.events() if x.device_type == kind and x.cpu_parent is None]
    return {"kernels": len(events), "busy_ms": round(sum(x.time_range.elapsed_us() for x in events) / 1000, 4)}


def peak_mib(function: Call, device: str) -> float:
    """By how much the call's peak of memory exceeds what was held before it."""
    if device != "cuda":
        return round(common.peak_growth(function) / 2**20, 1)
    torch.cuda.synchronize()
    torch.cuda.reset_peak_memory_stats()
    before = torch.cuda.memory_allocated()
    function()
    torch.cuda.synchronize()
    return round((torch.cuda.max_memory_allocated() - before) / 2**20, 1)


def host_waits(function: Call, device: str) -> dict[str, Any]:
    """How often the host waits for the GPU in one call, and at which lines most often; on a CPU, numbers read by Python.

    In the backward pass, torch names the line that started it.
    """
    if device != "cuda":
        with _ReadNumbers() as reads:
            function()
        return {"waits": reads.count, "where": ""}
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        torch.cuda.set_sync_debug_mode("warn")
        try:
            function()
        finally:
            torch.cuda.set_sync_debug_mode("default")
    waits = [x for x in caught if "called a synchronizing" in str(x.message)]
    places = Counter(f"{'/'.join(x.filename.split('/')[-2:])}:{x.lineno}" for x in waits)
    return {"waits": len(waits), "where": ", ".join(f"{n} x {place}" for place, n in places.most_common(8))}


class _ReadNumbers(TorchDispatchMode):
    def __init__(self) -> None:
        super().__init__()
        self.count = 0

    def __torch_dispatch__(self, function: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        self.count += function is torch.ops.aten._local_scalar_dense.default
        return function(*args, **(kwargs or {}))


def time_rows(run: Run, functions: Mapping[str, Call], peers: Sequence[str], **content: Any) -> None:
    """For every function a row of kind time, with its time over each peer's; then one of kind cost: kernels and memory.

    Args:
        peers: names among the functions; a peer that does not run here is left out.
        content: what else the rows say.
    """
    working = {name: call for name, call in functions.items() if run.attempt(name, call)}
    times = interleaved(working, run.sizes.rounds, run.device)
    for name, measured in times.items():
        ratios = {f"over_{peer}": round(measured.over(times[peer]), 3) for peer in peers if peer in times}
        run.row("time", name=name, **content, **measured.medians(), **ratios)
    # Times are on the disk by now: the profiler may fail where plain calls do not.
    for name, call in working.items():
        run.attempt(f"{name}, cost", functools.partial(_cost_row, run, name, call, content))


def _cost_row(run: Run, name: str, call: Call, content: dict[str, Any]) -> None:
    run.row("cost", name=name, **content, **launches(call, run.device), peak_mib=peak_mib(call, run.device))
