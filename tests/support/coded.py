"""The cache with slots in codes: kinds of it, and how near to its oracle it must come."""

import torch
from torch import Tensor

from megatron_dmc.ops.decode.codes import CacheDtype
from tests.support.decoding import Kind, Stream

KINDS: dict[str, Kind] = {
    "exact": Kind(),
    "truncated12": Kind(window_size=12),
    **{f"{operation}-w5": Kind(5, operation) for operation in ("merge", "evict", "absorb")},
    "merge-w5-truncated3": Kind(5, "merge", 3),
    "absorb-w100": Kind(100, "absorb"),
}
# What a single code may do that another order of sums rounds to the other side.
ONE_CODE = {"int8": 1e-3, "fp8": 2e-2, "int4": 2e-2}


def cast(stream: Stream, dtype: torch.dtype) -> Stream:
    return Stream(*(x.to(dtype) if x.is_floating_point() else x for x in stream))


def assert_close(found: Tensor, expected: Tensor, backend: str, cache_dtype: CacheDtype) -> None:
    error = (found.double() - expected).abs()
    if backend == "torch":
        assert error.max() < 1e-10
    else:
        assert error.median() < 1e-5 and error.max() < ONE_CODE[cache_dtype]
