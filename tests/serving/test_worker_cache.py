"""The worker's cache without an engine: single tokens and chunks take turns on the same headers, in every form."""

from typing import Any

import pytest
import torch
from torch import Tensor

from megatron_dmc.ops.decode.codes import CACHE_DTYPES, CacheDtype
from tests.support.coded import assert_close
from tests.support.decoding import Kind, Stream, draw_stream, oracle, rotation
from tests.support.oracle import Shape

HEADS, KV_HEADS, WIDTH, PAGE, BLOCKS, LONGEST = 4, 2, 32, 8, 24, 64
# First blocks of two requests.
FIRSTS = (7, 9)
# Tokens at a time of each request; 0: one token by kernels.
TURNS = [0, 1, 0, 7, 0, 0, 1, 5, 0, 1, 0, 0, 9, 0]
SEQ = sum(max(n, 1) for n in TURNS)


# Of single tokens and of chunks.
FORMS = ["triton-and-torch", "triton", "cpp"]


@pytest.fixture(params=FORMS)
def form(request: pytest.FixtureRequest) -> str:
    return str(request.param)


def make_cache_of(form: str, monkeypatch: pytest.MonkeyPatch, kind: Kind) -> Any:
    from megatron_dmc.serving import kernels

    monkeypatch.setitem(kernels.OF_DEVICES, "cpu", kernels.CPP if form == "cpp" else kernels.TRITON)
    cache = make_cache(kind, torch.float32)
    if form == "triton-and-torch":
        monkeypatch.delitem(kernels.OF_DEVICES, "cpu")
    return cache


def choose(form: str, monkeypatch: pytest.MonkeyPatch) -> None:
    from megatron_dmc.serving import kernels

    chosen = {"torch": {}, "triton": {"cpu": kernels.TRITON}, "cpp": {"cpu": kernels.CPP}}
    monkeypatch.setattr(kernels, "OF_DEVICES", chosen[form])


def make_cache(kind: Kind, dtype: torch.dtype, cache_dtype: CacheDtype | None = None) -> Any:
    """Whatever somebody may have left lies in its blocks: numbers that look right, and NaN. vLLM's null block is zero."""
    from megatron_dmc.serving.header import Header
    from megatron_dmc.serving.spec import DMCSpec
    from megatron_dmc.serving.worker_cache import WorkerCache

    settings = {**kind._asdict(), "decision_source": "projection"}
    header = Header.of(settings, WIDTH, LONGEST, PAGE, dtype=dtype, cache_dtype=cache_dtype)
    assert header.blocks == 1
    spec = DMCSpec(
        block_size=PAGE,
        num_kv_heads=KV_HEADS,
        head_size=header.slot_bytes // 2 // header.stored_as.itemsize,
        dtype=header.stored_as,
        reserved_slots=header.reserved_slots,
        near_pages=header.near_cells,
        local_window=kind.local_window,
        longest=LONGEST,
        by_kernels=True,
    )
    words = torch.randint(-3, 40, (BLOCKS, KV_HEADS * PAGE * header.slot_bytes // 4), dtype=torch.int32)
    words[:, ::7] = 0x7FC07FC0
    words[0] = 0
    pool = words.view(header.stored_as).view(BLOCKS, 1, KV_HEADS, PAGE, -1)
    return WorkerCache({"layer": pool[:, 0]}, header, spec, requests=2)


def angles(dtype: torch.dtype) -> Tensor:
    cos, sin = rotation(torch.arange(LONGEST)[None], WIDTH, dtype)
    return torch.cat([cos[0, :, 0, : WIDTH // 2], sin[0, :, 0, : WIDTH // 2]], dim=-1)


def run(cache: Any, stream: Stream) -> Tensor:
    """Both requests' tokens, in TURNS: [requests, seq, heads, head_dim]."""
    from megatron_dmc.serving.decoding import DecodingBuffers
    from megatron_dmc.serving.worker_cache import Chunks, Group, NewTokens, Request

    table, out, start = angles(stream.key.dtype), torch.empty_like(stream.query), 0
    buffers = DecodingBuffers(3, cache.header.layout.local_window, table, stream.key.dtype)
    for turn in TURNS:
        stop = start + max(turn, 1)
        now = stream.cut(start, stop)
        requests = [Request(range(0), [first], start) for first in FIRSTS]
        places = [cache.granted.places[first] for first in FIRSTS]
        if turn == 0 and cache.kernels is not None:
            # A graph may be filled up with a request of vLLM's null block.
            new = NewTokens(*(torch.cat([x[:, 0], x[:1, 0]]) for x in now))
            step = buffers.filled(torch.tensor([*FIRSTS, 0]), torch.tensor([stop, stop, 1], dtype=torch.int32))
            found = torch.full_like(new.query, float("nan"))
            cache.decode("layer", step, new, found)
            assert not found[2].any()
            out[:, start] = found[:2]
        elif cache.kernels is not None and cache.kernels.take_in is not None:
            spans = [Request(range(i * turn, (i + 1) * turn), each.blocks, start) for i, each in enumerate(requests)]
            chunks = Chunks(spans, cache.header.layout.local_window, table, stream.key.dtype)
            out[:, start:stop] = cache.take_in("layer", chunks, NewTokens(*(x.flatten(0, 1) for x in now))).view(
                2, turn, HEADS, WIDTH
            )
        elif turn <= 1:
            group = Group(slice(0, 2), requests, places)
            out[:, start] = cache.attend("layer", group, NewTokens(*(x[:, 0] for x in now)), table)
        else:
            for i, (request, place) in enumerate(zip(requests, places, strict=True)):
                group = Group(slice(0, turn), [request], [place], turn)
                out[i, start:stop] = cache.attend("layer", group, NewTokens(*(x[i] for x in now)), table)
        start = stop
    return out


@pytest.mark.parametrize(
    "kind",
    [Kind(), Kind(4), Kind(3, "evict"), Kind(4, "absorb"), Kind(4, "merge", 3)],
    ids=lambda kind: f"{kind.operation}{kind.local_window}-{kind.window_size}",
)
def test_single_tokens_and_chunks_take_turns(monkeypatch: pytest.MonkeyPatch, form: str, kind: Kind) -> None:
    if kind.window_size and form != "cpp":
        pytest.skip("Triton's kernels know no window_size")
    stream = draw_stream(Shape(2, SEQ, HEADS, KV_HEADS, WIDTH), torch.float32)
    cache = make_cache_of(form, monkeypatch, kind)
    before = cache.blocks.clone()
    # By and by, as many as are needed, and one more that is taken back.
    changes = {7: (0, [3, 5, 8, 2]), 9: (0, [4, 11, 12, 13, 14, 15])}
    cache.begin_step(changes, (), {})
    cache.begin_step({7: (3, [20, 21, 22]), 9: (6, [])}, (), {})
    out = run(cache, stream)
    torch.testing.assert_close(out.double(), oracle(stream, kind)[0], rtol=0, atol=1e-5)
    mine = [*FIRSTS, 3, 5, 8, 2, 20, 21, 22, 4, 11, 12, 13, 14, 15]
    others = [block for block in range(BLOCKS) if block not in mine and block > 0]
    assert torch.equal(cache.blocks[others], before[others])
    for first, report in cache.reports().items():
        assert not report.overflows
        kept = cache.blocks[first, :, 0]
        pages = (kept + cache.header.layout.base + PAGE - 1) // PAGE
        assert int(cache.granted.lists.cursor[cache.granted.places[first]]) == int(pages.sum())
        assert report.blocks == -(-int(pages.sum()) // KV_HEADS)
        assert report.slots == int(kept.sum()) + (KV_HEADS if kind.operation == "absorb" else 0)


@pytest.mark.parametrize(
    ("form", "cache_dtype"), [("triton", "fp8"), *((form, each) for form in ("torch", "cpp") for each in CACHE_DTYPES)]
)
@pytest.mark.parametrize(
    "kind",
    [Kind(), Kind(5), Kind(3, "evict"), Kind(5, "absorb"), Kind(9, "merge", 3), Kind(20, "absorb")],
    ids=lambda kind: f"{kind.operation}{kind.local_window}-{kind.window_size}",
)
def test_slots_in_codes(monkeypatch: pytest.MonkeyPatch, form: str, kind: Kind, cache_dtype: CacheDtype) -> None:
    """The ring lies in pages of its own, which come with a request's first token."""
    if kind.window_size and form == "triton":
        pytest.skip("Triton's kernels know no window_size")
    choose(form, monkeypatch)
    # A block of codes is smaller, and has to hold a header.
    monkeypatch.setattr(f"{__name__}.PAGE", 16)
    monkeypatch.setattr(f"{__name__}.BLOCKS", 48)
    stream = draw_stream(Shape(2, SEQ, HEADS, KV_HEADS, WIDTH), torch.float32)
    cache = make_cache(kind, torch.float32, cache_dtype)
    assert (cache.kernels is None) == (form == "torch")
    before = cache.blocks.clone()
    blocks = {7: [3, 5, 8, 2, *range(20, 32)], 9: [4, 1, 6, 10, *range(32, 46)]}
    blocks = {first: given[: cache.granted.most] for first, given in blocks.items()}
    cache.begin_step({first: (0, given) for first, given in blocks.items()}, (), {})
    out = run(cache, stream)
    assert_close(out, oracle(stream, kind, cache_dtype=cache_dtype)[0], "cpp", cache_dtype)
    others = [block for block in range(1, BLOCKS) if block not in [*FIRSTS, *blocks[7], *blocks[9]]]
    assert torch.equal(cache.blocks[others], before[others])
    for first, report in cache.reports().items():
        assert not report.overflows
        kept = cache.blocks[first, :, 0]
        pages = cache.header.near_cells + (kept + PAGE - 1) // PAGE
        assert int(cache.granted.lists.cursor[cache.granted.places[first]]) == int(pages.sum())
        assert report.blocks == -(-int(pages.sum()) // KV_HEADS)


@pytest.mark.parametrize("form", ["torch", "triton", "cpp"])
@pytest.mark.parametrize("turn", [0, 1, 5], ids=["kernel", "single", "chunk"])
def test_too_few_blocks_for_codes_hurt_nobody(monkeypatch: pytest.MonkeyPatch, form: str, turn: int) -> None:
    choose(form, monkeypatch)
    monkeypatch.setattr(f"{__name__}.TURNS", [turn] * (30 // max(turn, 1)))
    stream = draw_stream(Shape(2, 30, HEADS, KV_HEADS, WIDTH), torch.float32)
    stream.alpha[0] = False
    cache = make_cache(Kind(9), torch.float32, "fp8")
    granted = {7: [3], 9: [4, 11, 12, 13, 14, 15, 18, 19]}
    cache.begin_step({first: (0, given) for first, given in granted.items()}, (), {})
    before = cache.blocks.clone()
    out = run(cache, stream)
    assert_close(out[1], oracle(stream, Kind(9), cache_dtype="fp8")[0][1], "cpp", "fp8")
    others = [block for block in range(BLOCKS) if block not in (0, *FIRSTS, *granted[7], *granted[9])]
    assert torch.equal(cache.blocks[others], before[others])
    reports = cache.reports()
    assert reports[7].overflows and not reports[9].overflows


@pytest.mark.parametrize("turn", [0, 1, 5], ids=["kernel", "single", "chunk"])
def test_too_few_blocks_are_reported_and_hurt_nobody(monkeypatch: pytest.MonkeyPatch, form: str, turn: int) -> None:
    monkeypatch.setattr(f"{__name__}.TURNS", [turn] * (30 // max(turn, 1)))
    stream = draw_stream(Shape(2, 30, HEADS, KV_HEADS, WIDTH), torch.float32)
    stream.alpha[0] = False
    cache = make_cache_of(form, monkeypatch, Kind(4))
    cache.begin_step({7: (0, [3, 5]), 9: (0, [4, 11, 12, 13])}, (), {})
    before = cache.blocks.clone()
    out = run(cache, stream)
    torch.testing.assert_close(out[1].double(), oracle(stream, Kind(4))[0][1], rtol=0, atol=1e-5)
    others = [block for block in range(BLOCKS) if block not in (0, *FIRSTS, 3, 5, 4, 11, 12, 13)]
    assert torch.equal(cache.blocks[others], before[others])
    reports = cache.reports()
    assert reports[7].overflows and not reports[9].overflows
    assert reports[7].blocks == 2


def test_a_residual_slot_that_nobody_has_written_is_not_counted(monkeypatch: pytest.MonkeyPatch, form: str) -> None:
    monkeypatch.setattr(f"{__name__}.TURNS", [0, 0])
    cache = make_cache_of(form, monkeypatch, Kind(4, "absorb"))
    cache.blocks[list(FIRSTS)] = 0x40E00000  # 7.0
    cache.begin_step({7: (0, [3]), 9: (0, [4])}, (), {})
    run(cache, draw_stream(Shape(2, 2, HEADS, KV_HEADS, WIDTH), torch.float32))
    assert [report.slots for report in cache.reports().values()] == [0, 0]


def test_a_dummy_run_touches_nothing(monkeypatch: pytest.MonkeyPatch, form: str) -> None:
    """vLLM captures graphs with its null block, and warms up with blocks that nobody was granted."""
    from megatron_dmc.serving.decoding import DecodingBuffers
    from megatron_dmc.serving.worker_cache import NewTokens

    stream = draw_stream(Shape(2, 3, HEADS, KV_HEADS, WIDTH), torch.float32)
    cache = make_cache_of(form, monkeypatch, Kind(4, "absorb"))
    cache.begin_step({7: (0, [3])}, (), {})
    before, numbers = cache.blocks.clone(), cache.granted.numbers.clone()
    buffers = DecodingBuffers(2, 4, angles(torch.float32), torch.float32)
    new = NewTokens(*(x[:, 0] for x in stream))
    out = torch.empty_like(new.query)
    cache.decode("layer", buffers.filled(torch.tensor([0, 0]), torch.tensor([1, 5], dtype=torch.int32)), new, out)
    assert torch.equal(cache.blocks, before) and torch.equal(cache.granted.numbers, numbers)
    cache.decode("layer", buffers.filled(torch.tensor([1, 2]), torch.tensor([1, 1], dtype=torch.int32)), new, out)
    others = [block for block in range(BLOCKS) if block not in (1, 2)]
    assert torch.equal(cache.blocks[others], before[others])
    assert cache.granted.lists.granted.tolist()[1:] == numbers[BLOCKS:].view(3, -1)[1:, 0].tolist()
    assert not cache.reports()[7].overflows
