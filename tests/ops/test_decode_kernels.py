"""Decode's kernels: Triton's, in its interpreter and as compiled for GPUs; and the C++ for CPUs."""

import itertools
import json
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from typing import Any, NamedTuple

import pytest
import torch
from torch import Tensor
from torch._subclasses.fake_tensor import FakeTensorMode

from megatron_dmc.ops.decode import LayerCache, cpp
from megatron_dmc.ops.decode import torch as torch_form
from megatron_dmc.ops.decode import triton as triton_form
from megatron_dmc.ops.decode.cells import NearCells
from megatron_dmc.ops.decode.layout import Layout
from megatron_dmc.ops.decode.memory import Grants, Memory
from megatron_dmc.ops.decode.rows import Rows
from megatron_dmc.ops.decode.sequences import Step
from megatron_dmc.ops.decode.triton_launch import AVAILABLE, CHANGING
from megatron_dmc.ops.tokens import Tokens
from tests.support.coded import KINDS, assert_close, cast
from tests.support.decoding import Kind, Stream, draw_stream, oracle, rotation, through_cache
from tests.support.oracle import Draw, Shape
from tests.support.processes import run

needs_triton = pytest.mark.skipif(not AVAILABLE, reason="Triton is not installed")

FORMS = {"triton": triton_form, "cpp": cpp}
of_each_form = pytest.mark.parametrize("form", [pytest.param("triton", marks=needs_triton), "cpp"])

StepForm = Callable[[Tensor, Tokens, Rows, Any, float], Tensor]


class Case(NamedTuple):
    """A stream, how it is kept, and how many of each sequence's tokens are taken in before the steps."""

    batch: int
    heads: int
    kv_heads: int
    head_dim: int
    window: int
    operation: Any
    page_size: int = 16
    before: tuple[int, ...] = ()
    steps: int = 9
    clears: bool = False

    def __str__(self) -> str:
        sizes = f"B{self.batch}-H{self.heads}-KV{self.kv_heads}-D{self.head_dim}-P{self.page_size}"
        start = "-after" + "+".join(map(str, self.before)) if self.before else ""
        return f"{self.operation}{self.window}-{sizes}{start}-T{self.steps}{'-clears' * self.clears}"

    @property
    def lengths(self) -> Tensor:
        return torch.tensor(self.before or (0,) * self.batch)

    def stream(self, dtype: torch.dtype) -> Stream:
        seq = int(self.lengths.max()) + self.steps
        return draw_stream(Shape(self.batch, seq, self.heads, self.kv_heads, self.head_dim), dtype)


def begun(case: Case, stream: Stream, backend: str) -> LayerCache:
    """A cache after the tokens before the steps, with room for these."""
    clears, page = case.clears, case.page_size
    cache = LayerCache(case.window, case.operation, clears_last_channel=clears, page_size=page, backend=backend)
    seq = max(int(case.lengths.max()), 1)
    cos, sin = rotation(torch.arange(seq)[None], case.head_dim, stream.key.dtype)
    cache.attend(*stream.cut(0, seq), cos, sin, lengths=case.lengths)
    cache.reserve(case.steps)
    return cache


def at_once(case: Case, stream: Stream, cache: LayerCache) -> tuple[Tensor, Tokens, Any]:
    """The next token's query; the token; what the layers know of it."""
    assert cache.sequences is not None
    positions = cache.tokens
    part = Stream(*(x[torch.arange(case.batch), positions] for x in stream))
    cos, sin = rotation(positions[:, None], case.head_dim, stream.key.dtype)
    call = cache.sequences.begin(cos, sin, None, case.batch)
    assert isinstance(call, Step)
    return part.query, Tokens(*part[1:], cos[:, 0, 0], sin[:, 0, 0]), call


def steps(case: Case, stream: Stream, form: StepForm) -> tuple[Tensor, Rows]:
    """Outputs [batch, steps, heads, head_dim] and what is left."""
    cache, outputs = begun(case, stream, "torch" if form is torch_form.step else "auto"), []
    assert cache.rows is not None
    for _ in range(case.steps):
        query, new, call = at_once(case, stream, cache)
        outputs.append(form(query, new, cache.rows, call, case.head_dim**-0.5).clone())
    return torch.stack(outputs, dim=1), cache.rows


def few_shares(query: Tensor, new: Tokens, rows: Rows, call: Any, softmax_scale: float) -> Tensor:
    """step with shares of one block each, so that lists of a test's length are shared out."""
    memory = Memory.of(rows)
    length, advances = triton_form.advance(memory, new, rows.layout, call)
    advances.run()
    out, launches = triton_form.attend(memory, query, length, rows.layout, call, softmax_scale, splits=4, least_share=1)
    for launch in launches:
        launch.run()
    return out


def assert_same_state(found: Rows, expected: Rows, tolerance: float) -> None:
    def close(x: Tensor, y: Tensor) -> None:
        torch.testing.assert_close(x, y, rtol=tolerance, atol=tolerance)

    assert torch.equal(found.kept.view_as(expected.count), expected.count)
    assert torch.equal(found.cells.table, expected.cells.table)
    close(found.cells.first(found.cells.used), expected.cells.first(expected.cells.used))
    for name in ("sums", "decisions"):
        if (x := getattr(expected, name)) is not None:
            close(getattr(found, name), x)
    if found.decisions is not None:
        assert torch.equal(found.decisions.signbit(), expected.decisions.signbit())


# From nothing; with rings that fill and overflow; after prompts of several lengths.
CASES = [
    Case(1, 3, 1, 32, 0, "merge", 8, steps=37),
    Case(2, 4, 2, 32, 1, "merge", steps=9),
    Case(2, 2, 2, 80, 5, "merge", 8, steps=11, clears=True),
    Case(2, 4, 2, 32, 1, "evict", steps=9),
    Case(1, 8, 1, 32, 5, "absorb", 8, steps=14),
    Case(1, 6, 2, 128, 0, "merge", before=(63,), clears=True),
    Case(3, 6, 1, 64, 16, "merge", 32, before=(63, 37, 15)),
    Case(3, 4, 1, 32, 16, "evict", 16, before=(63, 37, 0)),
    Case(3, 4, 1, 32, 16, "absorb", 16, before=(63, 37, 13), clears=True),
    Case(2, 4, 2, 32, 100, "merge", 64, before=(123, 96)),
    Case(2, 8, 1, 112, 100, "absorb", 32, before=(137, 97), steps=6),
]


@of_each_form
@pytest.mark.parametrize("operation", ["merge", "evict", "absorb"])
def test_a_cache_runs_on_it(operation, form):
    """Chunks, steps, a reordering, and a change of the form in between."""
    case = Case(2, 4, 2, 32, 5, operation)
    stream = draw_stream(Shape(2, 30, 4, 2, 32), torch.float32)
    cache, outputs, start = LayerCache(5, operation, backend=form), [], 0
    for size, backend in ((7, form), *[(1, form)] * 9, (3, "torch"), *[(1, "torch")] * 3, *[(1, form)] * 8):
        positions = torch.arange(start, start + size).expand(2, -1)
        cache.backend = backend
        outputs.append(cache.attend(*stream.cut(start, start + size), *rotation(positions, 32, torch.float32)))
        start += size
        if start == 12:
            cache.select(torch.tensor([1, 0]))
            cache.select(torch.tensor([1, 0]))
    expected, _ = oracle(stream, Kind(case.window, operation))
    torch.testing.assert_close(torch.cat(outputs, dim=1), expected.float(), rtol=0, atol=1e-5)


@of_each_form
@pytest.mark.parametrize("case", CASES, ids=str)
def test_equals_the_oracle_and_the_form_for_any_device(case, form):
    stream = case.stream(torch.float32)
    out, rows = steps(case, stream, few_shares if case.before and form == "triton" else FORMS[form].step)
    expected, expected_rows = steps(case, stream, torch_form.step)
    torch.testing.assert_close(out, expected, rtol=0, atol=1e-5)
    assert_same_state(rows, expected_rows, 1e-5)
    truth, _ = oracle(stream, Kind(case.window, case.operation), clears_last_channel=case.clears)
    for b, start in enumerate(case.lengths.tolist()):
        torch.testing.assert_close(out[b].double(), truth[b, start : start + case.steps], rtol=0, atol=1e-5)


@needs_triton
@pytest.mark.parametrize(
    ("kind", "clears"), [*((kind, False) for kind in KINDS if "truncated" not in kind), ("merge-w5", True)]
)
def test_triton_knows_fp8(kind, clears):
    """With the ring beside the pages; tests/serving has it in them."""
    stream = draw_stream(Shape(2, 33, 4, 2, 8), torch.float64)
    expected, counts = oracle(stream, KINDS[kind], clears_last_channel=clears, cache_dtype="fp8")
    settings = {"cache_dtype": "fp8", "clears_last_channel": clears, "page_size": 4}
    cache = LayerCache(*KINDS[kind], **settings, backend="triton")
    out = through_cache(cast(stream, torch.float32), [*[1] * 4, 10, 1, 1, 8, *[1] * 9], cache)
    assert cache.rows is not None and cache.rows.form == "triton"
    assert_close(out, expected, "triton", "fp8")
    assert torch.equal(cache.slots, counts)


HALF_CASES = [
    Case(1, 4, 2, 64, 0, "merge", 8, before=(63,), steps=4),
    Case(2, 3, 1, 80, 5, "merge", before=(37, 4), steps=4, clears=True),
    Case(2, 4, 2, 32, 5, "absorb", before=(37, 5), steps=4),
    Case(1, 6, 1, 128, 16, "evict", 32, before=(63,), steps=3),
]


@of_each_form
@pytest.mark.parametrize("case", HALF_CASES, ids=str)
def test_half_precision_equals_the_form_for_any_device(case, form):
    """Triton in float16, since the interpreter multiplies matrices of bfloat16 wrongly."""
    dtype, digits = (torch.float16, 1) if form == "triton" else (torch.bfloat16, 8)
    stream = case.stream(dtype)
    out, rows = steps(case, stream, few_shares if form == "triton" else cpp.step)
    expected, expected_rows = steps(case, stream, torch_form.step)
    assert out.dtype == dtype
    torch.testing.assert_close(out.float(), expected.float(), rtol=0, atol=3e-3 * digits)
    assert_same_state(rows, expected_rows, 2e-3 * digits)


@of_each_form
def test_a_weight_of_zero_keeps_its_decision(form):
    """Decisions wait as omega with a sign; zero has one, too."""
    case = Case(1, 2, 2, 32, 3, "evict", steps=9)
    stream = case.stream(torch.float32)
    stream.omega.zero_()
    out, rows = steps(case, stream, FORMS[form].step)
    expected, expected_rows = steps(case, stream, torch_form.step)
    torch.testing.assert_close(out, expected, rtol=0, atol=1e-5)
    assert_same_state(rows, expected_rows, 1e-6)


class Lists(NamedTuple):
    """Rows with lists of any lengths, filled at random; what no query sees is NaN."""

    layout: Layout
    memory: Memory
    length: Tensor
    query: Tensor
    call: Any

    def dense(self, row: int) -> Tensor:
        table, page_size = self.memory.table.flatten(0, 1)[row].long(), self.layout.page_size
        return self.memory.slots[: self.memory.cells * page_size].unflatten(0, (-1, page_size))[table].flatten(0, 1)


class Call(NamedTuple):
    """As Step."""

    tokens: Tensor
    cos: Tensor
    sin: Tensor
    leaving_cos: Tensor
    leaving_sin: Tensor


def make_call(tokens: Tensor, head_dim: int, dtype: torch.dtype, window: int = 0) -> Call:
    """tokens: seen, with the new one."""
    at = [x[:, 0, 0] for x in rotation(tokens[:, None] - 1, head_dim, dtype)]
    leaving = [x[:, 0, 0] for x in rotation(tokens[:, None] - 1 - window, head_dim, dtype)]
    return Call(tokens, *at, *leaving)


def make_lists(lengths: list[int], group: int, head_dim: int, layout: Layout, dtype: torch.dtype) -> Lists:
    draw, rows, page_size = Draw(head_dim), len(lengths), layout.page_size
    pages = -(-max(lengths) // page_size) + 1
    cells = rows * pages
    # Cells of a row lie anywhere, and a table ends with cells that the row does not have.
    table = torch.randperm(cells, generator=draw.generator).int().view(rows, 1, pages)
    slots = torch.full((cells * page_size + 1, 2 * head_dim), float("nan"), dtype=dtype)
    sums = draw.uniform(rows, 1, 2 * head_dim + 1).float()
    sums[rows // 2 :, :, -1] = 0  # some residual slots are empty
    for row, length in enumerate(lengths):
        place = torch.arange(length)
        sees = (place < layout.local_window) | (place >= layout.base)
        if layout.absorbs:
            sees |= (place == layout.local_window) & (sums[row, 0, -1] > 0)
        place = place[sees]
        at = table[row, 0].long()[place // page_size] * page_size + place % page_size
        slots[at] = draw.normal(len(at), 2 * head_dim).to(dtype)
        table[row, 0, -(-length // page_size) :] = 2**30
    memory = Memory(slots, cells, table, torch.zeros(rows, 1, dtype=torch.int32), sums)
    query = draw.normal(rows, group, head_dim).to(dtype)
    call = make_call(torch.arange(rows) + 100, head_dim, dtype)
    return Lists(layout, memory, torch.tensor(lengths, dtype=torch.int32), query, call)


def attend_naively(lists: Lists) -> Tensor:
    """[batch, group, head_dim] in float64."""
    layout, memory, d = lists.layout, lists.memory, lists.query.shape[-1]
    half, x = d // 2, lists.query.double()
    cos, sin = lists.call.cos.double()[:, None], lists.call.sin.double()[:, None]
    query = x * cos + torch.cat([-x[..., half:], x[..., :half]], dim=-1) * sin
    if layout.clears_last_channel:
        query[..., -1] = 0
    query, out = query.to(lists.query.dtype).double(), torch.zeros_like(query)
    for row, length in enumerate(lists.length.tolist()):
        cut = lists._replace(memory=memory._replace(table=memory.table.clamp(max=memory.cells - 1)))
        slots = cut.dense(row)[:length].double()
        seen = ~slots.isnan().any(-1)
        bias = torch.zeros(length, dtype=torch.float64)
        if layout.absorbs and length > layout.local_window:
            bias[layout.local_window] = memory.sums[row, 0, -1].double().log()
        scores = query[row] @ slots[seen, :d].T * 0.3 + bias[seen]
        out[row] = scores.softmax(-1) @ slots[seen, d:] if length else 0.0
    return out


@needs_triton
@pytest.mark.parametrize(
    ("lengths", "group", "head_dim", "layout", "dtype", "splits"),
    [
        ([37, 0, 5], 4, 128, Layout(0), torch.float16, 1),
        ([290, 0, 63, 1], 6, 96, Layout(16, "evict", page_size=8), torch.float16, 4),
        ([150, 201, 64], 8, 64, Layout(16, "absorb", page_size=32), torch.float16, 8),
        ([130, 7, 66, 129], 1, 256, Layout(5, "absorb", page_size=64, clears_last_channel=True), torch.float16, 4),
        ([70, 33], 20, 80, Layout(64, "absorb", page_size=16), torch.float32, 2),
        ([100, 18], 3, 34, Layout(4, "merge", 12), torch.float32, 4),
    ],
    ids=["one-share", "evict", "absorb", "wide-clears", "large-group", "reserved-hidden"],
)
def test_attention_over_ragged_lists(lengths, group, head_dim, layout, dtype, splits):
    lists = make_lists(lengths, group, head_dim, layout, dtype)
    out, launches = triton_form.attend(
        lists.memory, lists.query, lists.length, layout, lists.call, 0.3, splits=splits, least_share=1
    )
    assert len(launches) == 1 + (splits > 1)
    for launch in launches:
        launch.run()
    expected = attend_naively(lists)
    torch.testing.assert_close(out.double(), expected, rtol=0, atol=1e-5 if dtype == torch.float32 else 2e-3)


@needs_triton
@pytest.mark.parametrize("cell", [-1, None, 2**20], ids=["none", "one-too-many", "anything"])
def test_a_page_that_is_nowhere_is_not_read(cell):
    """What an overflow leaves, or memory that nobody has written yet."""
    lists = make_lists([40, 70], 4, 32, Layout(), torch.float32)
    table, page = lists.memory.table, lists.layout.page_size
    memory = lists.memory._replace(cells=int(table[table < 2**30].max()) + 1)
    missing = int(table[0, 0, 1])
    memory.slots[missing * page : (missing + 1) * page] = float("nan")
    expected = attend_naively(lists)
    table[0, 0, 1] = memory.cells if cell is None else cell
    out, launches = triton_form.attend(
        memory, lists.query, lists.length, lists.layout, lists.call, 0.3, splits=2, least_share=1
    )
    for launch in launches:
        launch.run()
    torch.testing.assert_close(out.double(), expected, rtol=0, atol=1e-5)


class Engine(NamedTuple):
    """A serving engine's memory: blocks of 32-bit words; a sequence's state lies in the words of its first block, and the
    cells of other blocks are granted to it."""

    words: Tensor
    memory: Memory
    headers: Tensor


CELLS_PER_BLOCK = 4
NAN = 0x7FC07FC0  # as bits, in every dtype


def make_engine(case: Case, blocks: int, granted: list[int], dtype: torch.dtype = torch.float32) -> Engine:
    """Everything is filled with what somebody may have left there: numbers that look right, and NaN."""
    draw, d, heads, pages = Draw(7), case.head_dim, case.kv_heads, 6
    cell = case.page_size * 2 * d * dtype.itemsize // 4  # words
    block = CELLS_PER_BLOCK * cell
    # A block before and one after belong to nobody.
    around = torch.randint(-3, 40, (1 + blocks + 1, block), generator=draw.generator, dtype=torch.int32)
    around[:, ::7] = NAN
    around[[0, -1]] = NAN
    words = around[1:-1]
    of_head = 1 + pages + (2 * d + 1) + case.window
    grants_at = heads * of_head
    assert grants_at + 3 + blocks <= block
    floats = words.view(torch.float32)

    def view(x: Tensor, start: int, *size: int) -> Tensor:
        return x.as_strided((blocks, heads, *size), (block, of_head, 1)[: 2 + len(size)], block + start)

    headers = torch.tensor([5, 2, 9][: case.batch], dtype=torch.int32)
    free = [x for x in range(blocks) if x not in headers.tolist()]
    for i, (header, count) in enumerate(zip(headers.tolist(), granted, strict=True)):
        mine = free[i :: case.batch][:count]
        assert len(mine) == count
        words[header, grants_at : grants_at + 3] = torch.tensor([0, count, 0])
        words[header, grants_at + 3 : grants_at + 3 + count] = torch.tensor(mine, dtype=torch.int32)
    memory = Memory(
        slots=words.view(dtype).view(-1, 2 * d),
        cells=blocks * CELLS_PER_BLOCK,
        table=view(words, 1, pages),
        kept=view(words, 0),
        sums=view(floats, 1 + pages, 2 * d + 1) if Layout(0, case.operation).has_sums else None,
        decisions=view(floats, 1 + pages + 2 * d + 1, case.window) if case.window else None,
        place=headers,
        grants=Grants(
            blocks=words.as_strided((blocks, blocks), (block, 1), block + grants_at + 3),
            granted=words.as_strided((blocks,), (block,), block + grants_at + 1),
            cursor=words.as_strided((blocks,), (block,), block + grants_at),
            overflow=words.as_strided((blocks,), (block,), block + grants_at + 2),
            cells_per_block=CELLS_PER_BLOCK,
        ),
    )
    return Engine(words, memory, headers)


def with_grants_elsewhere(engine: Engine) -> Engine:
    """The same, with the lists of blocks in tensors of their own, where they have other places."""
    grants, headers = engine.memory.grants, engine.headers.long()
    place = torch.zeros(len(engine.words), dtype=torch.int32)
    place[headers] = torch.arange(len(headers), 0, -1, dtype=torch.int32)
    numbers = torch.zeros(len(headers) + 1, 3 + grants.blocks.shape[1], dtype=torch.int32)
    numbers[place[headers].long()] = torch.cat(
        [torch.stack([grants.granted, grants.cursor, grants.overflow], 1), grants.blocks], 1
    )[headers]
    moved = Grants(numbers[:, 3:], *numbers[:, :3].unbind(1), cells_per_block=CELLS_PER_BLOCK, place=place)
    return engine._replace(memory=engine.memory._replace(grants=moved))


def engine_steps(case: Case, stream: Stream, engine: Engine, starts: list[int], form: str) -> Tensor:
    """Outputs [steps, batch, heads, head_dim]; sequence i is there from step starts[i] on."""
    outputs, layout = [], Layout(case.window, case.operation, None, case.clears, case.page_size)
    for now in range(case.steps):
        tokens = (now + 1 - torch.tensor(starts)).clamp(min=0)
        part = Stream(*(x[torch.arange(case.batch), (tokens - 1).clamp(min=0)] for x in stream))
        call = make_call(tokens, case.head_dim, stream.key.dtype, case.window)
        new = Tokens(*part[1:], call.cos, call.sin)
        outputs.append(FORMS[form].step_in(engine.memory, part.query, new, layout, call, case.head_dim**-0.5))
    return torch.stack(outputs)


def alone(case: Case, stream: Stream, sequence: int, count: int) -> tuple[Tensor, Rows]:
    """The first tokens of one sequence in this package's own memory: outputs [count, heads, head_dim], what is left."""
    one = Stream(*(x[sequence : sequence + 1, :count] for x in stream))
    out, rows = steps(case._replace(batch=1, steps=count), one, torch_form.step)
    return out[0], rows


ENGINE_CASES = [
    Case(2, 2, 2, 32, 0, "merge", 8, steps=30),
    Case(2, 4, 2, 32, 5, "merge", 8, steps=26),
    Case(2, 2, 2, 32, 8, "absorb", 8, steps=24, clears=True),
    Case(1, 3, 1, 80, 3, "evict", 8, steps=22),
]


@of_each_form
def test_grants_may_lie_elsewhere(form):
    case = ENGINE_CASES[1]._replace(steps=14)
    stream, outputs, taken = case.stream(torch.float32), [], []
    for elsewhere in (False, True):
        engine = make_engine(case, 14, [5, 1])
        if elsewhere:
            engine = with_grants_elsewhere(engine)
        outputs.append(engine_steps(case, stream, engine, [0, 3], form))
        grants, at = engine.memory.grants, engine.headers.long()
        at = at if grants.place is None else grants.place[at].long()
        taken.append(
            (grants.cursor[at].tolist(), grants.overflow[at].tolist(), engine.memory.table[engine.headers.long()])
        )
    assert torch.equal(*outputs) and taken[0][:2] == taken[1][:2] and taken[0][0][0] > 2
    assert torch.equal(taken[0][2], taken[1][2])


@of_each_form
@pytest.mark.parametrize("case", ENGINE_CASES, ids=str)
def test_rows_in_an_engines_memory_take_their_cells(case, form):
    stream, starts = case.stream(torch.float32), [0, 3][: case.batch]
    engine = make_engine(case, 14, [5] * case.batch)
    before = engine.words.clone()
    out = engine_steps(case, stream, engine, starts, form)
    memory, page_size = engine.memory, case.page_size
    mine = set(engine.headers.tolist())
    for b, header in enumerate(engine.headers.tolist()):
        expected, rows = alone(case, stream, b, case.steps - starts[b])
        torch.testing.assert_close(out[starts[b] :, b], expected, rtol=0, atol=1e-5)
        assert not out[: starts[b], b].any()
        assert torch.equal(memory.kept[header], rows.count[0].int())
        taken = 0
        for head in range(case.kv_heads):
            base = rows.layout.base
            length = base + int(rows.count[0, head])
            pages = -(-length // page_size)
            taken += pages
            cells = [int(x) for x in memory.table[header, head, :pages]]
            mine |= {cell // CELLS_PER_BLOCK for cell in cells}
            found = torch.cat([memory.slots[cell * page_size : (cell + 1) * page_size] for cell in cells])[:length]
            held = rows.cells.slots[rows.cells.places(torch.arange(length).expand(len(rows.kept), -1))[head]]
            torch.testing.assert_close(found, held, rtol=0, atol=1e-5)
            if rows.sums is not None:
                torch.testing.assert_close(memory.sums[header, head], rows.sums[head], rtol=0, atol=1e-5)
        assert memory.grants.cursor[header] == taken
        assert memory.grants.overflow[header] == 0
    others = [block for block in range(len(before)) if block not in mine]
    assert len(others) > 2
    assert torch.equal(engine.words[others], before[others])


@of_each_form
@pytest.mark.parametrize("granted", [[1, 5], [0, 5]], ids=["too-few", "none"])
def test_a_sequence_without_cells_hurts_nobody(granted, form):
    case = Case(2, 2, 2, 32, 5, "absorb", 8, steps=24)
    stream = case.stream(torch.float32)
    stream.alpha[:, ::2] = False
    engine = make_engine(case, 14, granted)
    before = engine.words.clone()
    out = engine_steps(case, stream, engine, [0, 0], form)
    grants, headers = engine.memory.grants, engine.headers.tolist()
    assert grants.overflow[headers].tolist() == [1, 0]
    assert int(grants.cursor[headers[0]]) == granted[0] * CELLS_PER_BLOCK
    torch.testing.assert_close(out[:, 1], alone(case, stream, 1, case.steps)[0], rtol=0, atol=1e-5)
    assert not out.isnan().any()
    if not granted[0]:
        assert not out[:, 0].any()
    around = engine.words.as_strided((2, before.shape[1]), (before.shape[1] * (len(before) + 1), 1), 0)
    assert (around == NAN).all()
    given = [x for header in headers for x in grants.blocks[header, : int(grants.granted[header])].tolist()]
    others = [block for block in range(len(before)) if block not in (*headers, *given)]
    assert torch.equal(engine.words[others], before[others])


@of_each_form
def test_a_table_that_is_too_short_overflows(form):
    case = Case(1, 1, 1, 32, 0, "merge", 8, steps=20)
    stream = case.stream(torch.float32)
    stream.alpha.zero_()
    engine = make_engine(case, 14, [5])
    memory = engine.memory._replace(table=engine.memory.table[..., :2])
    after = engine.memory.table[5, 0, 2:].clone()
    out = engine_steps(case, stream, engine._replace(memory=memory), [0], form)
    expected = alone(case, stream, 0, case.steps)[0]
    torch.testing.assert_close(out[:16, 0], expected[:16], rtol=0, atol=1e-5)
    assert not out.isnan().any()
    assert memory.grants.overflow[5] == 1 and memory.grants.cursor[5] == 2
    assert torch.equal(engine.memory.table[5, 0, 2:], after)


@needs_triton
@pytest.mark.parametrize("dtype", [torch.float32, torch.float16], ids=["fp32", "fp16"])
@pytest.mark.parametrize(("window", "page_size", "head_dim"), [(0, 8, 80), (16, 16, 32), (5, 64, 128)])
def test_writing_what_a_chunk_leaves(window, page_size, head_dim, dtype):
    batch, seq, kv_heads = 2, 41, 3
    draw, layout = Draw(seq), Layout(window, "absorb" if window else "merge", page_size=page_size)
    rows = Rows(layout, batch, kv_heads, head_dim, like=torch.zeros(1, dtype=dtype))
    chosen = draw.uniform(batch, seq, kv_heads) < 0.4
    before = torch.tensor([[0, 3, 20], [7, 1, 2]])
    ordinal = chosen.cumsum(1) + before[:, None] - 1
    rows.cells.make_room(layout.base + 1 + ordinal[:, -1].flatten())
    # Keys as a part of something wider, and values whose heads and tokens have changed places.
    key = draw.normal(batch, seq, kv_heads, 2 * head_dim).to(dtype)[..., head_dim:]
    value = draw.normal(batch, kv_heads, seq, head_dim).to(dtype).transpose(1, 2)
    expected = rows.cells.slots.clone()
    for b, t, h in chosen.nonzero().tolist():
        place = torch.tensor([[layout.base + int(ordinal[b, t, h])]]).expand(batch * kv_heads, 1)
        slot = rows.cells.places(place)[b * kv_heads + h]
        expected[slot] = torch.cat([key[b, t, h], value[b, t, h]])
    triton_form.write(rows, chosen, ordinal, key, value)
    assert torch.equal(rows.cells.slots, expected)


def test_shares_follow_the_device_and_the_batch():
    """8192 slots of 8 rows keep 132 processors busy twice over, and a large batch is not shared out needlessly."""
    splits = triton_form.splits_for(8, 8192, 132)
    share = max(-(-8192 // (splits * 64)) * 64, triton_form.LEAST_SHARE)
    assert 8 * -(-8192 // share) >= 2 * 132
    assert triton_form.splits_for(8, 100, 132) == 1
    assert triton_form.splits_for(1, 10**6, 132) == triton_form.MOST_SPLITS
    assert triton_form.splits_for(4096, 8192, 132) == triton_form.FEWEST_SPLITS


def fake_launches(
    case: Case, dtype: torch.dtype, *, grants: bool = False, splits: int | None = None, cache_dtype: Any = None
) -> list[Any]:
    """What a step and the writing of a chunk launch, for tensors without memory: nothing can be read back from them."""
    layout = Layout(case.window, case.operation, None, case.clears, case.page_size, cache_dtype)
    codes = layout.codes(case.head_dim)
    heads, d = (case.batch, case.kv_heads), case.head_dim
    cells, i32 = 64, torch.int32
    empty = torch.empty
    numbers = empty(3, case.batch, dtype=i32).unbind()
    memory = Memory(
        slots=empty(cells * case.page_size, 2 * d, dtype=dtype if codes is None else torch.uint8),
        cells=cells,
        table=empty(*heads, 512, dtype=i32),
        kept=empty(*heads, dtype=i32 if grants else torch.int64),
        codes=codes,
        near=None if codes is None or grants else empty(*heads, layout.base, 2 * d, dtype=dtype),
        near_cells=NearCells.of(layout, d, dtype) if grants else None,
        sums=empty(*heads, 2 * d + 1) if layout.has_sums else None,
        decisions=empty(*heads, case.window) if case.window else None,
        place=empty(case.batch, dtype=i32) if grants else None,
        grants=Grants(empty(case.batch, 9, dtype=i32), *numbers, cells_per_block=16, place=empty(case.batch, dtype=i32))
        if grants
        else None,
    )
    query = empty(case.batch, case.heads, d, dtype=dtype)
    key, value = empty(2, *heads, d, dtype=dtype)
    new = Tokens(key, value, empty(heads, dtype=torch.bool), empty(heads), query, query)
    at = empty(4, case.batch, d, dtype=dtype)
    call = Call(empty(case.batch, dtype=torch.int64), *at)
    length, advances = triton_form.advance(memory, new, layout, call)
    _, attends = triton_form.attend(memory, query, length, layout, call, 0.1, splits=splits)
    if codes is not None:
        # What a chunk leaves torch's operations write.
        return [advances, *attends]
    chosen = empty(case.batch, 50, case.kv_heads, dtype=torch.bool)
    many = empty(2, case.batch, 50, case.kv_heads, d, dtype=dtype)
    writes = triton_form.write_in(memory, layout, chosen, chosen.long(), *many)
    return [advances, *attends, writes]


def test_a_step_is_three_launches_and_reads_nothing_back():
    with FakeTensorMode():
        launches = fake_launches(Case(1, 32, 8, 128, 16, "merge"), torch.bfloat16)
    assert [x.body.__name__ for x in launches] == ["advance", "attend", "join", "write"]


def test_numbers_that_change_are_numbers_of_the_kernels():
    with FakeTensorMode():
        launches = fake_launches(Case(1, 4, 2, 64, 16, "absorb"), torch.bfloat16, grants=True, splits=4)
    numbers = {name for x in launches for name, value in x.arguments.items() if type(value) is int and name.islower()}
    assert {
        name for name in numbers if not name.startswith(("query_", "key_", "value_", "cos_", "leaving_"))
    } == CHANGING


def test_what_this_form_cannot_do_is_named():
    key = torch.empty(1, 2, 64, dtype=torch.bfloat16, device="meta")
    assert "Triton is not installed" in (triton_form.unsupported(Layout(), key) or "") or AVAILABLE
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(triton_form, "AVAILABLE", True)
        with FakeTensorMode():
            key = torch.empty(1, 2, 64, dtype=torch.bfloat16, device="cuda")
            assert triton_form.unsupported(Layout(), key) is None
            assert triton_form.unsupported(Layout(5, "absorb"), key) is None
            assert triton_form.unsupported(Layout(5, cache_dtype="fp8"), key) is None
            assert triton_form.unsupported(Layout(5, cache_dtype="int4"), key) == "cache_dtype is int4"
            assert triton_form.unsupported(Layout(window_size=12), key) == "window_size is 12"
            assert triton_form.unsupported(Layout(0, "evict"), key) == "evict needs a local window"
            assert triton_form.unsupported(Layout(), key.double()) == "keys are torch.float64"
            assert triton_form.unsupported(Layout(), torch.cat([key] * 5, dim=-1)) == "head_dim is 320"
        patch.setattr(triton_form, "AVAILABLE", False)
        assert triton_form.unsupported(Layout(), key) == "Triton is not installed"
    with FakeTensorMode(), pytest.raises(ValueError, match="knows no window_size, got 12"):
        case = Case(1, 2, 2, 32, 0, "merge")
        memory = Memory.of(Rows(Layout(window_size=12), 1, 2, 32, like=torch.zeros(1)))
        new = Tokens(*torch.zeros(2, 1, 2, 32), *torch.zeros(2, 1, 2), *torch.zeros(2, 1, 32))
        triton_form.advance(memory, new, Layout(window_size=12), make_call(torch.ones(case.batch), 32, torch.float32))


def test_the_module_can_be_imported_without_triton():
    program = """
import sys
sys.modules["triton"] = None
import torch
from megatron_dmc.ops.decode import triton
from megatron_dmc.ops.decode.layout import Layout
print(triton.unsupported(Layout(), torch.zeros(1, 32)))
"""
    done = run("-c", program)
    assert done.returncode == 0, done.stderr
    assert done.stdout == "Triton is not installed\n"


# Of both kinds of memory; every operation; groups and heads that are padded; one share and many.
COMPILED = {
    "bf16-merge16-D128-G4": (Case(1, 32, 8, 128, 16, "merge"), torch.bfloat16, {}),
    "bf16-absorb64-D128-G8-engine": (Case(2, 64, 8, 128, 64, "absorb"), torch.bfloat16, {"grants": True}),
    "bf16-merge0-D64-G7-clears": (Case(2, 14, 2, 64, 0, "merge", clears=True), torch.bfloat16, {"splits": 1}),
    "fp16-evict100-D80-G1": (Case(2, 4, 4, 80, 100, "evict", 8), torch.float16, {}),
    "bf16-merge16-D256-G3": (Case(2, 12, 4, 256, 16, "merge", 64), torch.bfloat16, {}),
    "bf16-merge16-D128-G64": (Case(2, 64, 1, 128, 16, "merge", 32), torch.bfloat16, {}),
    "fp32-merge16-D128-G6": (Case(2, 12, 2, 128, 16, "merge"), torch.float32, {}),
    "bf16-merge16-D128-G4-fp8": (Case(1, 32, 8, 128, 16, "merge"), torch.bfloat16, {"cache_dtype": "fp8"}),
    "bf16-absorb64-D64-G4-engine-fp8": (
        Case(2, 16, 4, 64, 64, "absorb", 32),
        torch.bfloat16,
        {"cache_dtype": "fp8", "grants": True},
    ),
}
ARCHITECTURES = (80, 90, 100)
# A program's on the smallest GPU of these architectures' families (8.6, 8.9), which run what is compiled for 8.0.
SHARED_MEMORY = 99 * 1024

_COMPILE = """
import json, sys
from torch._subclasses.fake_tensor import FakeTensorMode
from tests.ops import test_decode_kernels as cases
from tests.support.kernels import compiled

for name, architecture in json.loads(sys.argv[1]):
    case, dtype, options = cases.COMPILED[name]
    with FakeTensorMode():
        launches = cases.fake_launches(case, dtype, **options)
    for launch in launches:
        print(json.dumps([name, architecture, launch.body.__name__, compiled(launch, architecture).summary()]))
"""


@pytest.fixture(scope="module")
def compiled_kernels(tmp_path_factory) -> dict[tuple[str, int], dict[str, dict[str, int]]]:
    """By name in COMPILED, architecture and kernel. Two processes, since compiling is what takes time here."""
    work = list(itertools.product(COMPILED, ARCHITECTURES))

    def compile_some(part: list[tuple[str, int]]) -> list[Any]:
        cache = str(tmp_path_factory.mktemp("triton"))
        done = run("-c", _COMPILE, json.dumps(part), timeout=600, TRITON_INTERPRET="0", TRITON_CACHE_DIR=cache)
        assert done.returncode == 0, done.stderr
        return [json.loads(line) for line in done.stdout.splitlines()]

    found: dict[tuple[str, int], dict[str, dict[str, int]]] = {}
    with ThreadPoolExecutor(2) as pool:
        for name, architecture, kernel, summary in itertools.chain(*pool.map(compile_some, (work[::2], work[1::2]))):
            found.setdefault((name, architecture), {})[kernel] = summary
    return found


@needs_triton
@pytest.mark.parametrize("architecture", ARCHITECTURES)
@pytest.mark.parametrize("name", COMPILED)
def test_kernels_compile_without_spills(compiled_kernels, name, architecture):
    _, dtype, options = COMPILED[name]
    kernels = compiled_kernels[name, architecture]
    coded = "cache_dtype" in options
    writes = set() if coded else {"write"}
    assert set(kernels) == {"advance", "attend"} | writes | ({"join"} if options.get("splits") != 1 else set())
    for kernel, found in kernels.items():
        print(name, architecture, kernel, found)
        assert found["local"] == 0, kernel
        assert found["shared"] <= SHARED_MEMORY, kernel
    attend = kernels["attend"]
    # Slots are copied to shared memory 16 bytes at a time, nothing smaller but the cells' numbers; matrices are multiplied by
    # tensor cores, but for float32, which they would round.
    assert attend["copies of 16 bytes"] >= 8
    assert attend["other copies"] == 0
    assert (attend["tensor cores"] > 0) == (dtype != torch.float32)
    if not coded:
        assert kernels["write"]["loads of 16 bytes"] >= 2 and kernels["write"]["stores of 16 bytes"] >= 2
