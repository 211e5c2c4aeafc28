"""Granted blocks on the device and reports from it, without an engine."""

import pickle
from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor

REQUESTS, MOST, BLOCKS, ROWS = 2, 5, 20, 4


@pytest.fixture
def granted() -> Any:
    from megatron_dmc.serving.grants import GrantedBlocks

    return GrantedBlocks(REQUESTS, MOST, BLOCKS, ROWS, torch.device("cpu"))


def plan(granted: Any, changes: dict[int, tuple[int, list[int]]], ended: tuple[int, ...] = ()) -> None:
    for index, value in granted.plan(changes, ended).items():
        granted.numbers[index] = value


def list_of(granted: Any, first: int) -> tuple[list[int], int, int]:
    """Blocks, cells taken, whether some were wanting; found as kernels find them."""
    lists = granted.lists
    at = int(lists.place[first])
    return lists.blocks[at, : int(lists.granted[at])].tolist(), int(lists.cursor[at]), int(lists.overflow[at])


def test_blocks_are_appended_and_taken_back(granted: Any) -> None:
    plan(granted, {7: (0, [3, 4]), 9: (0, [5])})
    plan(granted, {7: (2, [6]), 9: (1, [])})
    assert list_of(granted, 7)[0] == [3, 4, 6] and list_of(granted, 9)[0] == [5]
    plan(granted, {7: (1, [8, 2])})
    assert list_of(granted, 7)[0] == [3, 8, 2]
    plan(granted, {7: (2, [])})
    assert list_of(granted, 7)[0] == [3, 8]
    assert list_of(granted, 1) == ([], 0, 0)


def test_nothing_is_copied_where_nothing_changes(granted: Any) -> None:
    plan(granted, {7: (0, [3, 4])})
    assert granted.plan({7: (2, [])}, ()) == {}
    assert granted.plan({7: (1, [])}, ()) != {}


def test_a_place_begins_anew(granted: Any) -> None:
    """For another request, for the same first block again, and for a preempted one that nobody has said has ended."""
    for ended, first in (((), 7), ((7,), 9), ((9,), 9), ((), 9)):
        plan(granted, {first: (0, [3])}, ended)
        assert list_of(granted, first) == ([3], 0, 0)
        at = granted.places[first]
        granted.lists.cursor[at], granted.lists.overflow[at] = 4, 1
    assert list_of(granted, 7) == ([], 0, 0)
    assert len(granted.places) == 1


def test_places_are_used_again_and_do_not_run_out(granted: Any) -> None:
    for first in range(1, 19):
        plan(granted, {first: (0, [19]), first + 1: (0, [])}, (first - 1, 0))
        assert list_of(granted, first)[0] == [19]
    with pytest.raises(RuntimeError, match="more than 2 requests hold blocks; this is an error of the plugin"):
        granted.plan({5: (0, [])}, ())


def test_more_blocks_than_there_is_room_for_are_refused(granted: Any) -> None:
    with pytest.raises(RuntimeError, match="is granted 6 blocks, there is room for 5; this is an error of the plugin"):
        granted.plan({7: (2, [1, 2, 3, 4])}, ())


@pytest.mark.parametrize("kernel", [False, True], ids=["any-device", "kernel"])
@pytest.mark.parametrize(("blocks", "overflows"), [(2, False), (1, True)])
def test_cells_are_taken_in_order_and_never_too_many(granted: Any, kernel: bool, blocks: int, overflows: bool) -> None:
    """Six rows of two requests open a page each; the second request has blocks enough."""
    plan(granted, {7: (0, [3, 6][:blocks]), 9: (0, [5])})
    take = taken_by_kernels if kernel else taken_by_any_device
    cells = [take(granted, rows) for rows in ([2, 1], [3, 1])]
    first, second = ([cell for step in cells for cell in step[i]] for i in (0, 1))
    limit = blocks * ROWS
    given = [block * ROWS + i for block in (3, 6) for i in range(ROWS)][: min(5, limit)]
    assert sorted(x for x in first if x > 0) == given
    assert sorted(second) == [5 * ROWS, 5 * ROWS + 1]
    assert list_of(granted, 7)[1:] == (min(5, limit), int(overflows))
    assert list_of(granted, 9)[1:] == (2, 0)


def taken_by_any_device(granted: Any, rows: list[int]) -> list[list[int]]:
    """The cells of as many rows of each request as open a page."""
    from megatron_dmc.serving.rows import EngineCells

    places = torch.tensor([granted.places[first] for first in (7, 9)])
    table = torch.zeros(6, 3, dtype=torch.int32)
    cells = EngineCells(
        torch.zeros(BLOCKS * ROWS * 8, 4), table, torch.zeros(6, dtype=torch.long), 8, granted.lists, places
    )
    opens = torch.tensor([[row < count for row in range(3)] for count in rows])
    cells.make_room(opens.flatten() * 8)
    return [table[3 * i : 3 * i + count, 0].tolist() for i, count in enumerate(rows)]


def taken_by_kernels(granted: Any, rows: list[int]) -> list[list[int]]:
    from megatron_dmc.ops.decode import triton
    from megatron_dmc.ops.decode.layout import Layout
    from megatron_dmc.ops.decode.memory import Memory
    from megatron_dmc.ops.tokens import Tokens
    from megatron_dmc.serving.decoding import Decoding

    found: list[list[int]] = []
    for first, count in zip((7, 9), rows, strict=True):
        table = torch.full((BLOCKS, count, 3), -1, dtype=torch.int32)
        memory = Memory(
            slots=torch.zeros(BLOCKS * ROWS * 8, 4),
            cells=BLOCKS * ROWS,
            table=table,
            kept=torch.zeros(BLOCKS, count, dtype=torch.int32),
            sums=torch.zeros(BLOCKS, count, 5),
            place=torch.tensor([first], dtype=torch.int32),
            grants=granted.lists,
        )
        x, turn = torch.ones(1, count, 2), torch.ones(1, 2)
        new = Tokens(x, x, torch.zeros(1, count, dtype=torch.bool), torch.ones(1, count), turn, turn)
        call = Decoding(torch.tensor([1], dtype=torch.int32), memory.place, turn, turn, turn, turn)
        triton.advance(memory, new, Layout(page_size=8), call)[1].run()
        found.append(table[first, :, 0].tolist())
    return found


class Event:
    """As torch.cuda.Event, for numbers that come late."""

    def __init__(self, numbers: Tensor):
        self.numbers, self.waits = numbers, 0

    def __call__(self) -> list[list[int]]:
        self.waits += 1
        return list(self.numbers.tolist())


@pytest.fixture
def late(monkeypatch: pytest.MonkeyPatch) -> Callable[[Tensor], tuple[Any, Event]]:
    """A step's report of requests 7 and 9, made before its numbers are there."""
    from megatron_dmc.serving import reports
    from megatron_dmc.serving.connector import Used

    def make(numbers: Tensor) -> tuple[Any, Event]:
        event = Event(numbers)
        monkeypatch.setattr(reports, "to_host", lambda _: event)
        return Used(3, ROWS, reports.Reports([7, 9], numbers, ROWS)), event

    return make


def test_a_report_waits_when_it_is_read_or_pickled_and_once(late: Any) -> None:
    from vllm.v1.outputs import KVConnectorOutput

    from megatron_dmc.serving.connector import Used
    from megatron_dmc.serving.spec import Report

    used, event = late(torch.zeros(3, 2, dtype=torch.int64))
    assert not KVConnectorOutput(kv_connector_worker_meta=used).is_empty()
    assert event.waits == 0
    event.numbers.copy_(torch.tensor([[5, 0], [40, 3], [0, 0]]))
    expected = Used(3, ROWS, {7: Report(2, 40), 9: Report(0, 3)})
    assert pickle.loads(pickle.dumps(used)) == expected
    assert dict(used.reports) == expected.reports and used.reports[7].blocks == 2
    assert event.waits == 1


def test_an_overflow_is_an_error_of_the_plugin(late: Any) -> None:
    from vllm.v1.core.block_pool import BlockPool

    from megatron_dmc.serving.spec import DMCManager, DMCSpec

    spec = DMCSpec(block_size=8, num_kv_heads=2, head_size=16, dtype=torch.float32, longest=100)
    pool = BlockPool(BLOCKS, enable_caching=False, hash_block_size=8)
    manager = DMCManager(spec, pool, enable_caching=False, kv_cache_group_id=0, scheduler_block_size=8)
    other, _ = late(torch.tensor([[4, 4], [9, 9], [0, 0]]))
    used, _ = late(torch.tensor([[4, 4], [9, 9], [0, 1]]))
    assert used.aggregate(other).reports[9].overflows and not used.aggregate(other).reports[7].overflows
    manager.start_step([])
    with pytest.raises(RuntimeError, match="needed more cache than it was granted; this is an error of the plugin"):
        manager.end_step(1, ROWS, used.reports)
