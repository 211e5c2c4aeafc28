"""vLLM's real engine, in this process, over an export of tests/support/served.py. vLLM is imported where it is used."""

import gc
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

from tests.support.served import NEW_TOKENS, Served

# Small steps: prompts come in several chunks, and several prompts in one step.
OPTIONS: dict[str, Any] = {
    "dtype": "float32",
    "max_model_len": 512,
    "enforce_eager": True,
    "max_num_seqs": 8,
    "block_size": 16,
    "max_num_batched_tokens": 48,
    "skip_tokenizer_init": True,
    "disable_log_stats": False,
    "num_gpu_blocks_override": 500,  # or vLLM writes zeros to a whole GiB
}
# For an engine in this process. vLLM reads them when it is imported.
ENVIRONMENT = {
    "HF_HUB_OFFLINE": "1",
    "VLLM_CPU_KVCACHE_SPACE": "1",
    "VLLM_ENABLE_V1_MULTIPROCESSING": "0",
    "VLLM_NO_USAGE_STATS": "1",
    "OMP_NUM_THREADS": "1",
}


class Engine:
    """Attributes: llm; scheduler, manager and pool: the engine's parts that hold a request's blocks."""

    def __init__(self, llm: Any):
        self.llm = llm
        self.core = llm.llm_engine.engine_core.engine_core
        self.scheduler = self.core.scheduler
        (self.manager,) = self.scheduler.kv_cache_manager.coordinator.single_type_managers
        self.pool = self.scheduler.kv_cache_manager.block_pool
        self.free_at_first = self.pool.get_num_free_blocks()
        self.most_at_once = self.preemptions = self.most_in_flight = 0
        self._watch()

    def _watch(self) -> None:
        """Counts what the scheduler does; it does the same."""
        schedule, preempt = self.scheduler.schedule, self.scheduler._preempt_request

        def schedules(*args: Any, **kwargs: Any) -> Any:
            out = schedule(*args, **kwargs)
            self.most_at_once = max(self.most_at_once, len(out.num_scheduled_tokens))
            self.most_in_flight = max(self.most_in_flight, len(self.manager.in_flight))
            return out

        def preempts(*args: Any, **kwargs: Any) -> Any:
            self.preemptions += 1
            return preempt(*args, **kwargs)

        self.scheduler.schedule, self.scheduler._preempt_request = schedules, preempts

    def generate(self, prompts: list[list[int]], new_tokens: int = NEW_TOKENS, **sampling: Any) -> list[list[int]]:
        """Greedy outputs of all prompts, given at once."""
        return [list(out.outputs[0].token_ids) for out in self.outputs(prompts, max_tokens=new_tokens, **sampling)]

    def outputs(self, prompts: list[list[int]], **sampling: Any) -> list[Any]:
        """vLLM's own."""
        return self.llm.generate([{"prompt_token_ids": x} for x in prompts], params(**sampling), use_tqdm=False)

    def is_as_at_first(self) -> bool:
        """Whether every block is free again and nothing is remembered of any request."""
        # An asynchronous scheduler leaves the last step, in which no request was left.
        under_way = [records for _, records in self.manager.in_flight]
        left = self.manager.use, self.manager.req_to_blocks, *under_way
        return self.pool.get_num_free_blocks() == self.free_at_first and not any(left)


def params(**sampling: Any) -> Any:
    from vllm import SamplingParams

    return SamplingParams(**{"temperature": 0, "ignore_eos": True, "detokenize": False, **sampling})


@contextmanager
def engine(case: Served, **options: Any) -> Iterator[Engine]:
    """options: of vllm.LLM, over OPTIONS."""
    from vllm import LLM
    from vllm.distributed import cleanup_dist_env_and_memory

    running = None
    try:
        running = Engine(LLM(str(case.folder), **{**OPTIONS, **options}))
        yield running
    finally:
        if running is not None:
            running.core.shutdown()
        del running
        cleanup_dist_env_and_memory()
        gc.collect()


@contextmanager
def asynchronous() -> Iterator[None]:
    """Has the CPU platform keep vLLM's asynchronous scheduling, which it switches off because it gains nothing there."""
    from vllm.platforms.cpu import CpuPlatform

    check = CpuPlatform.__dict__["check_and_update_config"]

    def keeps(cls: Any, config: Any) -> None:
        check.__func__(cls, config)
        config.scheduler_config.async_scheduling = True

    CpuPlatform.check_and_update_config = classmethod(keeps)
    try:
        yield
    finally:
        CpuPlatform.check_and_update_config = check
