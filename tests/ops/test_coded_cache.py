"""The compressed cache with slots in codes: however the tokens are cut into calls, it is its oracle."""

import functools

import pytest
import torch
from torch import Tensor

from megatron_dmc.ops.decode import LayerCache, cpp, triton
from megatron_dmc.ops.decode.codes import CACHE_DTYPES, CacheDtype
from megatron_dmc.ops.decode.layout import Layout
from tests.support.coded import KINDS, ONE_CODE, assert_close, cast
from tests.support.decoding import Kind, Stream, another, draw_stream, oracle, rotation, through_cache
from tests.support.oracle import Shape

by_kind = pytest.mark.parametrize("kind", KINDS.values(), ids=KINDS)
by_cache_dtype = pytest.mark.parametrize("cache_dtype", CACHE_DTYPES)
by_backend = pytest.mark.parametrize("backend", ["torch", "cpp"])
SHAPES = [Shape(2, 33, 4, 2, 8), Shape(1, 35, 3, 1, 20)]
CUTS = {
    "prefill": lambda seq: [seq],
    "steps": lambda seq: [1] * seq,
    "chunks": lambda seq: [3, 11, 1, 1, 8, seq - 24],
}
DTYPES = {"torch": torch.float64, "cpp": torch.float32}


@functools.cache
def stream_and_oracle(shape: Shape, kind: Kind, cache_dtype: CacheDtype) -> tuple[Stream, Tensor, Tensor]:
    stream = draw_stream(shape, torch.float64)
    return stream, *oracle(stream, kind, cache_dtype=cache_dtype)


@by_backend
@by_cache_dtype
@pytest.mark.parametrize("cuts", CUTS.values(), ids=CUTS)
@by_kind
@pytest.mark.parametrize("shape", SHAPES, ids=str)
def test_equals_oracle(shape, kind, cuts, cache_dtype, backend):
    stream, expected, counts = stream_and_oracle(shape, kind, cache_dtype)
    cache = LayerCache(*kind, cache_dtype=cache_dtype, backend=backend, page_size=4)
    stream = cast(stream, DTYPES[backend])
    out = through_cache(stream, cuts(shape.seq), cache)
    assert_close(out, expected, backend, cache_dtype)
    assert torch.equal(cache.slots, counts)
    if kind.local_window < shape.seq:
        # And codes do say something else.
        whole = through_cache(stream, [shape.seq], LayerCache(*kind, backend=backend))
        assert (out - whole).abs().max() > 1e-4


@by_cache_dtype
@pytest.mark.parametrize("kind", ["exact", "absorb-w5", "merge-w5-truncated3"])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=["fp32", "bf16"])
@pytest.mark.parametrize("shape", [Shape(1, 150, 6, 2, 64), Shape(1, 130, 3, 1, 128)], ids=str)
def test_compiled_code_is_torchs_at_larger_sizes(shape, dtype, kind, cache_dtype):
    """More than one part of a chunk's queries, of its keys, and of a list; heads for which there is code of its own."""
    stream, cuts = draw_stream(shape, dtype), [shape.seq - 80, 1, 1, 70, *[1] * 8]
    found, expected = (
        through_cache(stream, cuts, LayerCache(*KINDS[kind], cache_dtype=cache_dtype, backend=backend)).float()
        for backend in ("cpp", "torch")
    )
    error = (found - expected).abs()
    if dtype == torch.float32:
        assert error.median() < 1e-4 and error.max() < ONE_CODE[cache_dtype]
    else:  # numbers that are rounded before they become codes, or are not, often become another one
        assert error.mean() < 1e-2


@by_backend
@by_cache_dtype
@pytest.mark.parametrize("kind", ["merge-w5", "absorb-w5"])
def test_the_last_channel_that_is_cleared_has_no_say(kind, cache_dtype, backend):
    stream = draw_stream(Shape(1, 40, 4, 2, 8), torch.float64)
    expected, _ = oracle(stream, KINDS[kind], clears_last_channel=True, cache_dtype=cache_dtype)
    for cuts in ([40], [25, 1, 1, 13]):
        cache = LayerCache(*KINDS[kind], cache_dtype=cache_dtype, clears_last_channel=True, backend=backend)
        assert_close(through_cache(cast(stream, DTYPES[backend]), cuts, cache), expected, backend, cache_dtype)


@by_backend
@by_kind
def test_rows_of_different_lengths_reordered_and_repeated(kind, backend):
    stream = cast(draw_stream(Shape(3, 60, 4, 2, 8), torch.float64), DTYPES[backend])
    cache = LayerCache(*kind, cache_dtype="int4", backend=backend, page_size=4)
    lengths = torch.tensor([30, 0, 17])
    cos, sin = rotation(torch.arange(30)[None], 8, DTYPES[backend])
    cache.attend(*stream.cut(0, 30), cos, sin, lengths=lengths)
    chosen = torch.tensor([2, 0, 0, 1])
    cache.select(chosen)
    found, starts = [], lengths[chosen]
    for at in range(30):
        part = Stream(*(x[chosen, starts + at][:, None] for x in stream))
        found.append(cache.attend(*part, *rotation((starts + at)[:, None], 8, DTYPES[backend])))
    for row, (sequence, start) in enumerate(zip(chosen.tolist(), starts.tolist(), strict=True)):
        alone = Stream(*(x[sequence : sequence + 1, : start + 30] for x in stream))
        expected, _ = oracle(alone, kind, cache_dtype="int4")
        assert_close(torch.cat([x[row] for x in found]), expected[0, start:], backend, "int4")


@by_backend
@pytest.mark.parametrize("way", ["deepcopy", "saved", "moved"])
@pytest.mark.parametrize("kind", ["exact", "absorb-w5", "merge-w5-truncated3"])
def test_a_cache_can_be_copied_saved_and_moved(kind, way, backend, tmp_path):
    stream = cast(draw_stream(Shape(2, 60, 4, 2, 8), torch.float64), DTYPES[backend])
    settings = {"cache_dtype": "int4", "backend": backend}
    cache = LayerCache(*KINDS[kind], **settings)
    through_cache(stream.cut(0, 37), [30, 1, 1, 1, 4], cache)
    other = another(cache, way, LayerCache(*KINDS[kind], **settings), tmp_path)
    rest, cuts = stream.cut(37, 60), [1, 1, 11, 1, 9]
    # Neither has a part of the other.
    expected = through_cache(rest, cuts, cache)
    assert torch.equal(through_cache(rest, cuts, other), expected)


@pytest.mark.parametrize(
    "damage",
    [
        lambda state: state["cells"].pop("near"),
        lambda state: state["cells"].update(near=state["cells"]["near"][1:]),
        lambda state: state["cells"].update(slots=state["cells"]["slots"][:, 1:]),
        lambda state: state["cells"].update(slots=state["cells"]["slots"].float()),
        lambda state: state["cells"]["table"].add_(1000),
        lambda state: state["rows"]["kept"].add_(100),
    ],
)
def test_a_damaged_state_is_refused(damage):
    stream = draw_stream(Shape(2, 40, 4, 2, 8), torch.float32)
    cache = LayerCache(4, cache_dtype="int8")
    through_cache(stream, [40], cache)
    state = cache.state_dict()
    damage(state)
    with pytest.raises(ValueError, match="damaged"):
        LayerCache(4, cache_dtype="int8").load_state_dict(state)


def test_a_state_of_other_codes_is_refused_and_one_from_before_there_were_any_is_read():
    stream = draw_stream(Shape(2, 40, 4, 2, 8), torch.float32)
    cache = LayerCache(4)
    expected = through_cache(stream, [30], cache)
    state = cache.state_dict()
    with pytest.raises(ValueError, match="another layout"):
        LayerCache(4, cache_dtype="int8").load_state_dict(state)
    del state["layout"]["cache_dtype"]
    other = LayerCache(4)
    other.load_state_dict(state)
    assert torch.equal(other.slots, cache.slots) and len(expected)


@by_backend
@by_kind
def test_a_sequence_that_is_not_finite_harms_no_other(kind, backend):
    stream = cast(draw_stream(Shape(3, 40, 4, 2, 8), torch.float64), DTYPES[backend])
    for cuts in ([40], [20, *[1] * 20]):
        settings = {"cache_dtype": "int4", "page_size": 4, "backend": backend}
        expected = through_cache(stream, cuts, LayerCache(*kind, **settings))
        bad = Stream(*(x.clone() for x in stream))
        for x in (bad.key, bad.value):
            x[1, 7:] = float("nan")
        out = through_cache(bad, cuts, LayerCache(*kind, **settings))
        assert out[1, -1].isnan().any()
        assert torch.equal(out[[0, 2]], expected[[0, 2]])


@pytest.mark.parametrize(("cache_dtype", "bytes_of_slot"), [("int8", 136), ("fp8", 128), ("int4", 72)])
@pytest.mark.parametrize("kind", [Kind(), Kind(16, "absorb")], ids=["exact", "absorb-w16"])
def test_bytes_are_those_of_the_codes(kind, cache_dtype, bytes_of_slot):
    stream = draw_stream(Shape(1, 2048, 2, 2, 64), torch.bfloat16, merge=0.75)
    cache = LayerCache(*kind, cache_dtype=cache_dtype)
    through_cache(stream, [2048], cache)
    kept = int(cache.slots.sum()) - 2 * (kind.local_window + (kind.operation == "absorb"))
    assert 800 < kept < 1400
    beside = 2 * (17 * 256 + 129 * 4 + 200)  # ring, residual slot and its sums; decisions and counts
    assert kept * bytes_of_slot <= cache.nbytes <= 1.05 * (kept + 2 * 8) * bytes_of_slot + beside


def test_what_has_no_kernel_runs_on_torch_and_another_name_is_refused():
    key = torch.empty(1, 2, 64)
    assert triton.unsupported(Layout(cache_dtype="int4"), key) == "cache_dtype is int4"
    assert cpp.unsupported(Layout(cache_dtype="int4"), key) is None
    with pytest.raises(ValueError, match="cache_dtype must be int8, fp8, int4, or none"):
        LayerCache(cache_dtype="int2")  # type: ignore[arg-type]
