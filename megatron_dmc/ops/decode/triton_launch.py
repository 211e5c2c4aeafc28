"""Launches of Triton kernels as values, so that a test can compile what would be launched on a machine without a GPU."""

import contextlib
import functools
import inspect
from collections.abc import Callable, Mapping
from typing import Any, NamedTuple

import torch
from torch import Tensor

try:
    import triton
except ImportError:  # transformers demands no module that an exported model imports in a try block.
    AVAILABLE = False
else:
    AVAILABLE = True


# Numbers that change while a model runs, or between sessions. Triton would compile a kernel again where one of them is 1 or a
# multiple of 16; these only find single numbers in memory, and are of no use to the compiler.
CHANGING = frozenset(
    {"cells", "pages", "seq", "granted_sequence", "granted_most", "count_sequence"}
    | {
        f"{name}_{part}"
        for name in ("near", "table", "kept", "sums", "decisions", "alpha", "omega")
        for part in ("sequence", "head")
    }
)


class Launch(NamedTuple):
    """One launch.

    Attributes:
        body: a function of triton_kernels.py.
        grid: programs along each axis.
        arguments: by the body's names; a name in capitals is compiled in.
        warps: warps of a program.
        stages: iterations of a loop whose loads are under way at once.
    """

    body: Callable[..., None]
    grid: tuple[int, int]
    arguments: Mapping[str, Any]
    warps: int
    stages: int = 1

    def run(self) -> None:
        # Triton launches on the current device, and the layers of a model may lie on several.
        device = next(x.device for x in self.arguments.values() if isinstance(x, Tensor))
        with torch.cuda.device(device) if device.type == "cuda" else contextlib.nullcontext():
            kernel(self.body)[self.grid](**self.arguments, num_warps=self.warps, num_stages=self.stages)


@functools.cache
def kernel(body: Callable[..., None]) -> Any:
    """A function as a kernel; interpreted on the CPU where TRITON_INTERPRET is set when this is first called."""
    names = inspect.signature(body).parameters
    return triton.jit(body, do_not_specialize=[name for name in names if name in CHANGING])


def power_of_two(n: int, least: int = 1) -> int:
    """The first power of two that is not below n and least."""
    return max(least, 1 << (n - 1).bit_length())
