"""The compressed cache with slots in codes: however the tokens are cut into calls, it is its oracle."""

import functools

import pytest
import torch
from torch import Tensor

from megatron_dmc.ops.decode import LayerCache
from megatron_dmc.ops.decode.codes import CACHE_DTYPES
from tests.support.decoding import Kind, Stream, draw_stream, oracle, through_cache
from tests.support.oracle import Shape

KINDS: dict[str, Kind] = {
    "exact": Kind(),
    "truncated12": Kind(window_size=12),
    **{f"{operation}-w5": Kind(5, operation) for operation in ("merge", "evict", "absorb")},
    "merge-w5-truncated3": Kind(5, "merge", 3),
    "absorb-w100": Kind(100, "absorb"),
}
by_kind = pytest.mark.parametrize("kind", KINDS.values(), ids=KINDS)
by_cache_dtype = pytest.mark.parametrize("cache_dtype", CACHE_DTYPES)
SHAPES = [Shape(2, 43, 4, 2, 8), Shape(1, 45, 3, 1, 20)]
CUTS = {
    "prefill": lambda seq: [seq],
    "steps": lambda seq: [1] * seq,
    "chunks": lambda seq: [3, 17, 1, 1, 8, seq - 30],
}


@functools.cache
def stream_and_oracle(shape: Shape, kind: Kind, cache_dtype) -> tuple[Stream, Tensor, Tensor]:
    stream = draw_stream(shape, torch.float64)
    return stream, *oracle(stream, kind, cache_dtype=cache_dtype)


@by_cache_dtype
@pytest.mark.parametrize("cuts", CUTS.values(), ids=CUTS)
@by_kind
@pytest.mark.parametrize("shape", SHAPES, ids=str)
def test_equals_oracle(shape, kind, cuts, cache_dtype):
    stream, expected, counts = stream_and_oracle(shape, kind, cache_dtype)
    cache = LayerCache(*kind, cache_dtype=cache_dtype, backend="torch")
    out = through_cache(stream, cuts(shape.seq), cache)
    torch.testing.assert_close(out, expected, rtol=0, atol=1e-10)
    assert torch.equal(cache.slots, counts)
    if kind.local_window < shape.seq:
        # And codes do say something else.
        whole = through_cache(stream, [shape.seq], LayerCache(*kind, backend="torch"))
        assert (out - whole).abs().max() > 1e-4
