"""One safetensors file, read and written a tensor at a time: a header of JSON, then the tensors' bytes in its order.

safetensors' own functions take or map a whole file: written, its tensors are all in memory, and pages that were read stay with
the process.
"""

import json
import math
from collections.abc import Callable, Iterator, Mapping
from pathlib import Path
from typing import Any, NamedTuple

import numpy
import torch
from safetensors import SafetensorError, safe_open
from torch import Tensor

from megatron_dmc.config import ConfigError
from megatron_dmc.convert.rows import Shape
from megatron_dmc.files import why_no_file

DTYPES = {"F64": torch.float64, "F32": torch.float32, "F16": torch.float16, "BF16": torch.bfloat16}
_NAMES = {dtype: name for name, dtype in DTYPES.items()}
# Elements that are converted, checked or written together.
_PIECE = 2**22
_ALIGNMENT = 8


class Place(NamedTuple):
    """Where a tensor lies.

    Attributes:
        dtype: safetensors' name of it; one that is not in DTYPES is not read here.
        begin, length: bytes, in the file.
    """

    path: Path
    dtype: str
    shape: Shape
    begin: int
    length: int

    def read(self) -> Tensor:
        """The tensor; raises ConfigError if the file has become shorter than its header says."""
        data = numpy.fromfile(self.path, numpy.uint8, self.length, offset=self.begin)
        if len(data) != self.length:
            raise ConfigError(f"{self.path} has become shorter while it was read; fetch it again")
        return torch.from_numpy(data).view(DTYPES[self.dtype]).reshape(self.shape)


def places(path: Path) -> dict[str, Place]:
    """The tensors of a file by name; reads its header only.

    Raises:
        ConfigError: the file is absent or damaged, or its size is not what its header says.
    """
    # The library says of any file that it may not read that there is none.
    if (problem := why_no_file(path)) is not None:
        raise ConfigError(f"{path} {problem}")
    try:
        # The library checks what a header may say: offsets without gaps, up to the end of the file.
        with safe_open(path, framework="pt"):
            pass
    except (SafetensorError, OSError) as error:
        raise ConfigError(f"{path} cannot be read as safetensors ({error}); if truncated, fetch it again") from None
    with path.open("rb") as file:
        length = int.from_bytes(file.read(8), "little")
        header: dict[str, Any] = json.loads(file.read(length))
    header.pop("__metadata__", None)
    found = {}
    for name, entry in header.items():
        begin, end = entry["data_offsets"]
        found[name] = Place(path, entry["dtype"], tuple(entry["shape"]), 8 + length + begin, end - begin)
    return found


def write_file(
    path: Path,
    shapes: Mapping[str, Shape],
    tensors: Iterator[tuple[str, Tensor]],
    dtype: torch.dtype,
    advance: Callable[[int], None] = lambda count: None,
) -> None:
    """Writes one file, byte by byte as the library does; holds one tensor at a time. Anyone may read it whom the umask lets.

    Args:
        shapes: of the file's tensors, in the order in which ``tensors`` gives them; what follows them is left there.
        advance: told of bytes after they were written.

    Raises:
        OSError: as the operating system says it.
    """
    header, begins = _header(shapes, dtype)
    with path.open("wb") as file:
        file.write(header)
        for name, shape in shapes.items():
            file.seek(len(header) + begins[name])
            given, tensor = next(tensors, (None, None))
            if given is None or tensor is None:
                raise RuntimeError(f"{name} was planned and did not come")
            if given != name or tuple(tensor.shape) != shape:
                raise RuntimeError(f"{given} {list(tensor.shape)} came where {name} {list(shape)} was planned")
            for piece in tensor.detach().reshape(-1).split(_PIECE):
                data = piece.to(device="cpu", dtype=dtype).contiguous().view(torch.uint8)
                file.write(memoryview(data.numpy()))
                advance(len(data))
            # Two at a time would not fit.
            del given, tensor, piece, data


def _header(shapes: Mapping[str, Shape], dtype: torch.dtype) -> tuple[bytes, dict[str, int]]:
    """The file's beginning, and where each tensor begins after it. Tensors lie in the order of their names."""
    header: dict[str, Any] = {"__metadata__": {"format": "pt"}}
    begins, end = {}, 0
    for name in sorted(shapes):
        begins[name], end = end, end + math.prod(shapes[name]) * dtype.itemsize
        header[name] = {"dtype": _NAMES[dtype], "shape": list(shapes[name]), "data_offsets": [begins[name], end]}
    text = json.dumps(header, separators=(",", ":"), ensure_ascii=False).encode()
    text += b" " * (-len(text) % _ALIGNMENT)
    return len(text).to_bytes(8, "little") + text, begins


def is_finite(tensor: Tensor, dtype: torch.dtype | None = None) -> bool:
    """Whether no element is NaN or infinite in a dtype, None: in its own; looks at a piece at a time, since torch copies."""
    pieces = tensor.detach().reshape(-1).split(_PIECE)
    return all(bool(torch.isfinite(piece.to(dtype or tensor.dtype)).all()) for piece in pieces)
