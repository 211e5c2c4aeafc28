"""Triton kernels: which functions are some, and what the compiler makes of them for GPUs that are not here."""

import ast
import inspect
import re
import subprocess
import tempfile
from pathlib import Path
from typing import Any, NamedTuple

import torch
from torch import Tensor

from megatron_dmc.ops.decode.triton_launch import CHANGING, Launch

TYPES = {
    torch.bfloat16: "*bf16",
    torch.float16: "*fp16",
    torch.float32: "*fp32",
    torch.int32: "*i32",
    torch.int64: "*i64",
    torch.uint8: "*u8",
}


def is_kernel(function: ast.FunctionDef | ast.AsyncFunctionDef) -> bool:
    """A kernel is launched by its arguments' names, and Triton takes pointers, strides and sizes one by one."""
    annotations = [x.annotation for x in function.args.args if x.annotation]
    return any(ast.unparse(annotation) == "tl.constexpr" for annotation in annotations)


class Compiled(NamedTuple):
    """What became of a launch.

    Attributes:
        registers: of a thread.
        local: bytes of a thread in local memory: what did not fit into registers.
        shared: bytes of a program.
        ptx: the assembly.
    """

    registers: int
    local: int
    shared: int
    ptx: str

    def count(self, pattern: str) -> int:
        return len(re.findall(pattern, self.ptx))

    def summary(self) -> dict[str, int]:
        """Numbers by name; of instructions, how many stand in the assembly."""
        copies, wide = self.count(r"cp\.async\.c[ag]\."), self.count(r"cp\.async\.cg\.[^\n]*0x10,")
        return {
            "registers": self.registers,
            "local": self.local,
            "shared": self.shared,
            "tensor cores": self.count(r"mma\.sync|wgmma\.mma|tcgen05\.mma"),
            "copies of 16 bytes": wide,
            "other copies": copies - wide - self.count(r"cp\.async\.ca\.[^\n]*0x4,"),
            "loads of 16 bytes": self.count(r"ld\.global[^\n]*\.v4\.b32"),
            "stores of 16 bytes": self.count(r"st\.global[^\n]*\.v4\.b32"),
        }


def compiled(launch: Launch, architecture: int) -> Compiled:
    """Compiles what would be launched, for compute capability architecture / 10.

    Tensors are taken to begin at a multiple of 16 bytes, as those of torch do.
    """
    import triton
    from triton.backends.compiler import GPUTarget
    from triton.compiler import ASTSource

    signature: dict[str, str] = {}
    constants: dict[str, Any] = {}
    attributes: dict[tuple[int], list[list[Any]]] = {}
    for number, (name, parameter) in enumerate(inspect.signature(launch.body).parameters.items()):
        x = launch.arguments[name]
        is_fixed = name not in CHANGING
        if "constexpr" in str(parameter.annotation) or x is None or (is_fixed and isinstance(x, int) and x == 1):
            signature[name], constants[name] = "constexpr", x
            continue
        signature[name] = TYPES[x.dtype] if isinstance(x, Tensor) else "fp32" if isinstance(x, float) else "i32"
        if isinstance(x, Tensor) or (is_fixed and isinstance(x, int) and x % 16 == 0):
            attributes[(number,)] = [["tt.divisibility", 16]]
    source = ASTSource(triton.jit(launch.body), signature=signature, constexprs=constants, attrs=attributes)
    options = {"num_warps": launch.warps, "num_stages": launch.stages}
    kernel = triton.compile(source, target=GPUTarget("cuda", architecture, 32), options=options)
    usage = _resources(kernel.asm["cubin"])
    return Compiled(usage["REG"], usage["STACK"] + usage["LOCAL"], kernel.metadata.shared, kernel.asm["ptx"])


def _resources(cubin: bytes) -> dict[str, int]:
    import triton

    program = Path(triton.__file__).parent / "backends/nvidia/bin/cuobjdump"
    with tempfile.NamedTemporaryFile(suffix=".cubin") as file:
        file.write(cubin)
        file.flush()
        said = subprocess.run([program, "--dump-resource-usage", file.name], capture_output=True, text=True, check=True)
    return {name: int(n) for name, n in re.findall(r"\b(REG|STACK|LOCAL):(\d+)", said.stdout)}
