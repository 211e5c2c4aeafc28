"""Single tokens by Triton's kernels, straight on the headers in vLLM's blocks; on a CPU in Triton's interpreter."""

from collections.abc import Callable
from typing import Any

import pytest

from tests.support.engines import asynchronous, engine, params
from tests.support.served import Served

SMALL = {"max_model_len": 112, "max_num_batched_tokens": 32, "num_gpu_blocks_override": 60}
LENGTHS = (3, 33, 50)
TOKENS = 8
CASES: dict[str, tuple[str, dict[str, Any], dict[str, Any]]] = {
    "window-0": ("llama", {}, {}),
    "window-4": ("llama", {"local_window": 4}, {}),
    "evict": ("llama", {"operation": "evict", "local_window": 4}, {}),
    "absorb": ("llama", {"operation": "absorb", "local_window": 4}, {}),
    "neuron": ("qwen2", {"decision_source": "neuron"}, {}),
    "fp8": ("llama", {"local_window": 4}, {"cache_dtype": "fp8"}),
}


@pytest.fixture(autouse=True)
def by_kernels(monkeypatch: pytest.MonkeyPatch) -> None:
    from megatron_dmc.serving import kernels

    monkeypatch.setitem(kernels.OF_DEVICES, "cpu", kernels.TRITON)


@pytest.fixture
def decoded(monkeypatch: pytest.MonkeyPatch) -> list[int]:
    """How many requests each call of the kernels took a token of."""
    from megatron_dmc.serving.worker_cache import WorkerCache

    calls, decode = [], WorkerCache.decode

    def counts(self: Any, layer: str, step: Any, new: Any, out: Any) -> None:
        calls.append(int((step.tokens > 0).sum()))
        decode(self, layer, step, new, out)

    monkeypatch.setattr(WorkerCache, "decode", counts)
    return calls


def small_export(export: Callable[..., Served], case: str, lengths: tuple[int, ...] = LENGTHS) -> Served:
    family, dmc, config = CASES[case]
    return export(dmc, family, lengths=lengths, num_hidden_layers=2, **config)


@pytest.mark.parametrize("case", CASES)
def test_outputs_are_the_exports_own(export: Callable[..., Served], decoded: list[int], case: str) -> None:
    expected = small_export(export, case)
    assert len({token for out in expected.outputs for token in out[:TOKENS]}) > 4
    with engine(expected, **SMALL) as running:
        assert running.manager.spec.by_kernels
        assert running.generate(expected.prompts, TOKENS) == [out[:TOKENS] for out in expected.outputs]
        assert running.is_as_at_first()
    # Each token but the first of an answer, in two layers.
    assert sum(decoded) >= 2 * len(LENGTHS) * (TOKENS - 1) and max(decoded) == len(LENGTHS)


def test_preempted_and_aborted_requests(export: Callable[..., Served], decoded: list[int]) -> None:
    """Few blocks, two steps under way: what a step is granted is copied while the step before it may still run."""
    lengths = (61, 55, 33, 47, 58)
    expected = small_export(export, "window-4", lengths)
    options = {**SMALL, "num_gpu_blocks_override": 11, "scheduler_reserve_full_isl": False}
    finished: dict[str, list[int]] = {}
    with asynchronous(), engine(expected, **options) as running:
        llm, steps = running.llm.llm_engine, 0
        for number, prompt in enumerate(expected.prompts):
            llm.add_request(str(number), {"prompt_token_ids": prompt}, params(max_tokens=TOKENS))
        while llm.has_unfinished_requests():
            for out in llm.step():
                if out.finished:
                    finished[out.request_id] = list(out.outputs[0].token_ids)
            steps += 1
            if steps == 6:
                llm.abort_request(["1"])
        assert running.most_in_flight > 1 and running.preemptions > 0
        assert running.is_as_at_first()
    assert max(decoded) > 1
    for number in (0, 2, 3, 4):
        assert finished[str(number)] == expected.outputs[number][:TOKENS]
