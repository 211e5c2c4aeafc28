"""Few blocks and many requests: more at once than their tokens would allow, preemption, aborts, nothing lost."""

from collections.abc import Callable, Iterator
from contextlib import nullcontext
from pathlib import Path

import pytest

from tests.support.engines import OPTIONS, Engine, asynchronous, engine, params
from tests.support.served import NEW_TOKENS, Served, served, served_model

LENGTHS = (101, 150, 90, 140, 120, 111, 97, 135, 160, 105)
LONGEST = 208
# A request that never merges needs 13 blocks of 16, its header, and one for its next token; one block is vLLM's own.
SMALLEST = 13 + 1 + 1 + 1
SMALL = {"max_model_len": LONGEST, "max_num_seqs": 16, "num_gpu_blocks_override": 20, "max_num_batched_tokens": 64}


@pytest.fixture(scope="module")
def many(export: Callable[..., Served]) -> Served:
    return export({"local_window": 4}, lengths=LENGTHS)


@pytest.fixture(params=["synchronous", "asynchronous"])
def small(request: pytest.FixtureRequest, many: Served) -> Iterator[Engine]:
    """Twenty blocks, without the check that a whole prompt will fit."""
    is_late = request.param == "asynchronous"
    with (
        asynchronous() if is_late else nullcontext(),
        engine(many, **SMALL, scheduler_reserve_full_isl=False) as running,
    ):
        yield running
        assert running.most_in_flight > 1 if is_late else running.most_in_flight == 1


def test_requests_share_what_merging_saves(many: Served) -> None:
    """Uncompressed, three requests at most would fit."""
    with engine(many, **{**SMALL, "num_gpu_blocks_override": 36}) as running:
        assert running.generate(many.prompts) == many.outputs
        assert 35 // -(-(min(LENGTHS) + NEW_TOKENS) // 16) < 5 <= running.most_at_once
        assert running.preemptions == 0
        assert running.is_as_at_first()


def test_preempted_requests_begin_anew(small: Engine, many: Served) -> None:
    assert small.generate(many.prompts) == many.outputs
    assert small.preemptions > 2
    assert small.is_as_at_first()


def test_aborted_requests_give_their_blocks_back(small: Engine, many: Served) -> None:
    """In the middle of a prompt and of an answer. Others get the blocks while reports of the old owners are under way."""
    llm = small.llm.llm_engine
    finished: dict[str, list[int]] = {}

    def add(number: int, life: int) -> None:
        prompt = {"prompt_token_ids": many.prompts[number]}
        llm.add_request(f"{number}-{life}", prompt, params(max_tokens=NEW_TOKENS))

    for number in range(len(LENGTHS)):
        add(number, 0)
    # By step; each is aborted in the life that it then has, and begins the next one.
    aborts = {3: (0, 1), 5: (2, 0), 9: (0, 3), 20: (1, 4), 33: (5, 0)}
    lives, cut_short, steps = dict.fromkeys(range(len(LENGTHS)), 0), [], 0
    while llm.has_unfinished_requests():
        for out in llm.step():
            if out.finished and out.outputs[0].finish_reason != "abort":
                finished[out.request_id] = list(out.outputs[0].token_ids)
        steps += 1
        for number in aborts.get(steps, ()):
            name = f"{number}-{lives[number]}"
            if name not in finished:
                cut_short.append(name)
                llm.abort_request([name])
            lives[number] += 1
            add(number, lives[number])
    assert len(cut_short) > 6
    assert set(cut_short).isdisjoint(finished)
    assert {f"{number}-{life}" for number, life in lives.items()} <= set(finished)
    for name, tokens in finished.items():
        assert tokens == many.outputs[int(name.split("-")[0])], name
    assert small.is_as_at_first()


def test_a_request_that_never_merges_fits_the_smallest_pool(tmp_path: Path) -> None:
    never = served(served_model({}, merge_bias=-1e6), tmp_path, (LONGEST - NEW_TOKENS, LONGEST - NEW_TOKENS - 1, 100))
    assert never.ratios == [1.0, 1.0, 1.0]
    smallest = {**SMALL, "num_gpu_blocks_override": SMALLEST}
    with engine(never, **smallest) as running:
        assert running.generate(never.prompts) == never.outputs
        assert running.is_as_at_first()
    refused = pytest.raises(ValueError, match="To serve at least one request")
    with refused, engine(never, **{**smallest, "num_gpu_blocks_override": SMALLEST - 2}):
        pass


def test_a_second_engine_in_a_process_is_refused(many: Served) -> None:
    """vLLM would give it the first one's connector, and its layers no cache."""
    with engine(many) as running:
        with pytest.raises(RuntimeError, match="a process can hold one engine with DMC"):
            running.llm.__class__(str(many.folder), **{**OPTIONS, "num_gpu_blocks_override": 100})
        assert running.generate(many.prompts[:1]) == many.outputs[:1]
