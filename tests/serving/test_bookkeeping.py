"""The scheduler's counting alone, over vLLM's own pool of blocks: any order of steps, late reports, aborts and preemptions."""

import random
from typing import Any

import pytest

BLOCKS, BLOCK_SIZE, HEADERS, ROWS, CHUNK = 40, 8, 2, 6, 32


class Worker:
    """Does what a worker may do: n tokens fill at most n slots of each row, a page is taken when the one before is full."""

    def __init__(self, chance: random.Random, near_pages: int):
        self.chance, self.near_pages = chance, near_pages
        self.granted: dict[int, list[int]] = {}
        self.slots: dict[int, list[int]] = {}
        self.owner: dict[int, int] = {}

    def blocks(self, first: int) -> int:
        return -(-sum(self.near_pages + -(-count // BLOCK_SIZE) for count in self.slots[first]) // ROWS)

    def step(self, changes: dict[int, Any], tokens: dict[int, int]) -> dict[int, Any]:
        from megatron_dmc.serving.spec import Report

        reports = {}
        for first, (kept, new) in changes.items():
            if kept == 0:
                self.slots[first] = [0] * ROWS
            own = self.granted[first][: self.blocks(first)] if kept else []
            assert all(self.owner[block] == first for block in own), "another request has written to a block"
            self.granted[first] = self.granted.get(first, [])[:kept] + new
            assert self.granted[first][: len(own)] == own, "a block with slots was taken away"
            # Often the most that there can be.
            added = [max(0, tokens[first] - self.chance.choice([0, 0, 1, 40])) for _ in range(ROWS)]
            self.slots[first] = [count + more for count, more in zip(self.slots[first], added, strict=True)]
            used = self.blocks(first)
            assert used <= len(self.granted[first]), "more cells than were granted"
            self.owner |= dict.fromkeys(self.granted[first][:used], first)
            reports[first] = Report(used, sum(self.slots[first]))
        return reports


@pytest.mark.parametrize("seed", range(40))
@pytest.mark.parametrize(("most_late", "near_pages"), [(1, 0), (2, 0), (3, 0), (3, 2)])
def test_blocks_are_neither_lost_nor_shared(seed: int, most_late: int, near_pages: int) -> None:
    import torch
    from vllm.v1.core.block_pool import BlockPool

    from megatron_dmc.serving.grants import GrantedBlocks
    from megatron_dmc.serving.spec import DMCManager, DMCSpec

    chance = random.Random(seed)
    spec = DMCSpec(
        block_size=BLOCK_SIZE,
        num_kv_heads=2,
        head_size=16,
        dtype=torch.float32,
        header_blocks=HEADERS,
        most_tokens_at_once=CHUNK,
        longest=100,
        near_pages=near_pages,
    )
    pool = BlockPool(BLOCKS, enable_caching=False, hash_block_size=BLOCK_SIZE)
    manager = DMCManager(spec, pool, enable_caching=False, kv_cache_group_id=0, scheduler_block_size=BLOCK_SIZE)
    granted = GrantedBlocks(6, spec.most_blocks, BLOCKS, ROWS, torch.device("cpu"))
    worker, at_first = Worker(chance, near_pages), pool.get_num_free_blocks()
    seen: dict[str, int] = {}
    late: list[tuple[int, dict[int, Any]]] = []
    scheduled = freed = 0
    for number in range(300):
        if len(seen) < 6 and chance.random() < 0.4:
            seen[f"r{number}"] = 0
        tokens: dict[str, int] = {}
        for name in list(seen):
            n = chance.choice([1, 1, 3, CHUNK])
            if (
                chance.random() < 0.8
                and manager.get_num_blocks_to_allocate(name, seen[name] + n) <= pool.get_num_free_blocks()
            ):
                new = manager.allocate_new_blocks(name, seen[name] + n, seen[name] + n)
                assert len(new) == (HEADERS if seen[name] == 0 else 0)
                tokens[name], seen[name] = n, seen[name] + n
        step, changes, ended = manager.start_step(list(tokens))
        granted.plan(changes, ended)  # refuses more requests, or more blocks of one, than there can be
        firsts = {manager.req_to_blocks[name][0].block_id: n for name, n in tokens.items()}
        if changes:
            late.append((step, worker.step(changes, firsts)))
        scheduled += len(changes)
        for name in list(seen):
            if chance.random() < 0.05 or seen[name] > 70:  # finished, aborted or preempted, with reports under way
                manager.free(name)
                freed += 1
                if chance.random() < 0.5:
                    del seen[name]
                else:
                    seen[name] = 0
        while len(late) >= most_late:
            manager.end_step(late[0][0], ROWS, late.pop(0)[1])
        held = sum(len(use.held) for use in manager.use.values()) + sum(map(len, manager.req_to_blocks.values()))
        assert pool.get_num_free_blocks() + held == at_first
        figures = manager.figures()
        assert figures.compression_ratio >= 1 and figures.slots_used >= 0
    for step, reports in late:
        manager.end_step(step, ROWS, reports)
    for name in seen:
        manager.free(name)
    assert scheduled > 200 and freed > 10
    assert pool.get_num_free_blocks() == at_first and not manager.use and not manager.waits_for_reports


def test_ranks_reports_are_one() -> None:
    from megatron_dmc.serving.connector import Used
    from megatron_dmc.serving.spec import Report

    first = Used(7, 6, {3: Report(2, 90), 9: Report(1, 5)})
    second = Used(7, 4, {3: Report(4, 60), 9: Report(1, 6)})
    assert first.aggregate(second) == Used(7, 10, {3: Report(4, 150), 9: Report(1, 11)})


def test_a_late_ranks_report_is_no_reason_to_free_blocks() -> None:
    from megatron_dmc.serving.connector import Used
    from megatron_dmc.serving.spec import Report

    ranks = [Used(step, 6, {3: Report(blocks, 9)}) for step, blocks in ((6, 4), (7, 1), (7, 1))]
    for order in (ranks, ranks[::-1], ranks[1:] + ranks[:1]):
        found = order[0].aggregate(order[1]).aggregate(order[2])
        assert (found.step, found.reports) == (7, {})
