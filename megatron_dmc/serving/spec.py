"""The scheduler's side: how many blocks a request holds, and when unused ones go back to the pool.

A block is one *cell* of block_size slots for each layer and KV head of a worker, and any layer and head of the request that
owns it may take any cell. The first ``header_blocks`` of a request hold its state and are all that vLLM's own block table
shows. The others are known to the worker through the connector, so that they can be taken back.
"""

from collections import deque
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any, NamedTuple

from vllm.utils.math_utils import cdiv
from vllm.v1.core.kv_cache_utils import KVCacheBlock
from vllm.v1.core.single_type_kv_cache_manager import SingleTypeKVCacheManager
from vllm.v1.kv_cache_interface import FullAttentionSpec
from vllm.v1.kv_cache_spec_registry import KVCacheSpecRegistry, register_kv_cache_spec

# By a request's first block: how many of its blocks the worker keeps, and the ids of those that it gets.
Changes = dict[int, tuple[int, list[int]]]
# How much of the newest step's compression ratio enters the one that requests are admitted by.
_NEW_SHARE = 0.1


@dataclass(eq=False)
class Use:
    """What a running request holds; a new one after each preemption. Headers are not counted.

    Attributes:
        tokens: those that the worker has reported on.
        blocks: what it then used.
        slots: what it then held, of all layers and heads.
        target: tokens scheduled so far.
        held: its blocks.
        known: how many of them the worker knows.
    """

    tokens: int = 0
    blocks: int = 0
    slots: int = 0
    target: int = 0
    held: list[KVCacheBlock] = field(default_factory=list)
    known: int = 0


class Report(NamedTuple):
    """What the workers say of one request after a step.

    Attributes:
        blocks: the most that any of them used.
        slots: of all together, without the rings.
        overflows: one of them was granted too few blocks.
    """

    blocks: int
    slots: int
    overflows: bool = False


class Figures(NamedTuple):
    """For people: of all running requests, as last reported.

    Attributes:
        compression_ratio: tokens per slot, averaged over the last steps.
        slots_used: of all layers and KV heads, on all workers.
        cells_free: pages of block_size slots that nobody holds.
        most_requests: of max_model_len tokens at that ratio, at once.
    """

    compression_ratio: float
    slots_used: int
    cells_free: int
    most_requests: float


class DMCManager(SingleTypeKVCacheManager):
    """Reserves one slot per head for each token whose real use is not known yet, and nothing more.

    vLLM's methods grow arguments with every release: what is not used here is taken as it comes.
    """

    def __init__(self, kv_cache_spec: "DMCSpec", *args: Any, **kwargs: Any):
        super().__init__(kv_cache_spec, *args, **kwargs)
        if self.enable_caching:
            raise ValueError("prefix caching cannot be on for a model with DMC; use --no-enable-prefix-caching")
        self.spec = kv_cache_spec
        self.use: dict[str, Use] = {}
        self.in_flight: deque[tuple[int, dict[int, tuple[str, Use, int]]]] = deque()
        self.step = 0
        self.ended: list[int] = []  # first blocks of requests that the workers may still know
        self.ratio = 1.0
        self.rows = 0  # cells of a block on all workers together, once they have reported

    def _needed(self, use: Use, num_tokens: int) -> int:
        """Blocks for ``num_tokens`` in all: n more of them open at most ceil(n / block_size) pages per head, however full its
        last page is."""
        return (
            use.blocks + self.spec.pages_to_begin(use.tokens) + cdiv(max(num_tokens - use.tokens, 0), self.block_size)
        )

    def get_num_blocks_to_allocate(
        self, request_id: str, num_tokens: int, *args: Any, apply_admission_cap: bool = False, **kwargs: Any
    ) -> int:
        """Blocks that must be free for a request to reach ``num_tokens``.

        With ``apply_admission_cap`` vLLM asks whether a whole prompt will fit. The answer is what it should need at the
        ratio seen so far and the worst case of its last chunk, but never more than an empty pool has: that request would
        wait for ever.
        """
        use = self.use.get(request_id, Use())
        headers = self.spec.header_blocks - len(self.req_to_blocks.get(request_id, ()))
        needed = self._needed(use, num_tokens)
        if apply_admission_cap:
            chunk = cdiv(min(num_tokens, self.spec.most_tokens_at_once), self.block_size)
            needed = min(int(cdiv(needed, self.ratio)) + chunk, needed + 1)
        return headers + max(needed - len(use.held), 0)

    def allocate_new_blocks(self, request_id: str, num_tokens: int, *args: Any, **kwargs: Any) -> list[KVCacheBlock]:
        """Returns the new header blocks, which are all that vLLM's block table is to show."""
        use = self.use.setdefault(request_id, Use())
        use.target = num_tokens
        header = self.req_to_blocks[request_id]
        new = self.block_pool.get_new_blocks(self.spec.header_blocks - len(header))
        header.extend(new)
        use.held += self.block_pool.get_new_blocks(max(self._needed(use, num_tokens) - len(use.held), 0))
        return new

    def pop_blocks_for_free(self, request_id: str) -> list[KVCacheBlock]:
        use = self.use.pop(request_id, Use())
        self.ended += [block.block_id for block in self.req_to_blocks.get(request_id, ())[:1]]
        return super().pop_blocks_for_free(request_id) + use.held

    def get_num_common_prefix_blocks(self, running_request_id: str) -> int:
        return 0

    @classmethod
    def find_longest_cache_hit(
        cls, block_hashes: Any, max_length: int, kv_cache_group_ids: list[int], *args: Any, **kwargs: Any
    ) -> tuple[tuple[list[KVCacheBlock], ...], int]:
        return tuple([] for _ in kv_cache_group_ids), 0

    def first_blocks(self, request_ids: Sequence[str]) -> dict[str, int]:
        """By which workers know the requests."""
        return {request_id: self.req_to_blocks[request_id][0].block_id for request_id in request_ids}

    def reported(self, request_id: str) -> tuple[int, float]:
        """Tokens of a request that workers have reported on, and how many of them there are per slot."""
        use = self.use.get(request_id, Use())
        return use.tokens, use.tokens * self.rows / use.slots if use.slots else 1.0

    def start_step(self, request_ids: Sequence[str]) -> tuple[int, Changes, list[int]]:
        """The number of a step in which these requests have tokens, and what the worker has to know before it: changes, and
        the first blocks of requests that have ended."""
        self.step += 1
        changes, records = {}, {}
        for request_id, first in self.first_blocks(request_ids).items():
            use = self.use[request_id]
            changes[first] = use.known, [block.block_id for block in use.held[use.known :]]
            records[first] = request_id, use, use.target
            use.known = len(use.held)
        self.in_flight.append((self.step, records))
        ended, self.ended = self.ended, []
        return self.step, changes, ended

    def end_step(self, step: int, rows: int, reports: Mapping[int, Report]) -> None:
        """Takes in what requests really used after a step, and frees what no later step can touch.

        A report belongs to a step and a Use. A first block alone says nothing: it may be another request's by now.

        Args:
            rows: layers times KV heads on all workers together.
            reports: by the requests' first blocks.

        Raises:
            RuntimeError: a request needed more cells than it was granted, so its answer is wrong.
        """
        while self.in_flight and self.in_flight[0][0] < step:
            self.in_flight.popleft()  # without scheduled tokens there is no report
        if not self.in_flight or self.in_flight[0][0] != step:
            return  # said already, or never begun
        _, records = self.in_flight.popleft()
        if reports:
            self.rows = rows
        if any(report.overflows for report in reports.values()):
            raise RuntimeError(
                "megatron-dmc: a request needed more cache than it was granted; this is an error of the plugin, please "
                "report it"
            )
        tokens = slots = 0
        for first, report in reports.items():
            request_id, use, reached = records[first]
            if self.use.get(request_id) is not use:
                continue  # finished, or preempted and perhaps begun anew
            use.tokens, use.blocks = reached, report.blocks
            use.slots = report.slots + rows * min(reached, self.spec.local_window)
            keep = self._needed(use, use.target + 1)  # steps in flight, and a token more: no coming and going
            if keep < len(use.held):
                self.block_pool.free_blocks(reversed(use.held[keep:]))
                del use.held[keep:]
                use.known = min(use.known, keep)
            tokens, slots = tokens + reached, slots + use.slots
        if slots:
            self.ratio = max(1.0, self.ratio + _NEW_SHARE * (tokens * rows / slots - self.ratio))

    @property
    def waits_for_reports(self) -> bool:
        """Whether steps in flight will give blocks back."""
        return any(
            self.use.get(request_id) is use and reached - use.tokens > self.block_size
            for _, records in self.in_flight
            for request_id, use, reached in records.values()
        )

    def figures(self) -> Figures:
        pool = self.block_pool
        return Figures(
            self.ratio,
            sum(use.slots for use in self.use.values()),
            pool.get_num_free_blocks() * self.rows,
            (pool.num_gpu_blocks - 1) / self.spec.blocks_of_a_request(self.ratio),  # one is vLLM's null block
        )


# Without this the built-in specs would never be registered: vLLM registers them when the list is empty.
KVCacheSpecRegistry._ensure_registered()


@register_kv_cache_spec(manager_class=DMCManager)
@dataclass(frozen=True, kw_only=True)
class DMCSpec(FullAttentionSpec):
    """One layer's cache.

    Attributes:
        header_blocks: a request's first blocks, which hold its state.
        reserved_slots: slots of every head's list that are no token's, taken with the first token that leaves the ring.
        near_pages: pages of every head's list that come with the first token and hold its ring, beside those of kept slots.
        local_window: tokens in the ring.
        most_tokens_at_once: that a step may bring.
        longest: max_model_len.
        by_kernels: decode's Triton kernels take single tokens in.
    """

    header_blocks: int = 1
    reserved_slots: int = 0
    near_pages: int = 0
    local_window: int = 0
    most_tokens_at_once: int = 0
    longest: int = 0
    by_kernels: bool = False

    @classmethod
    def merge(cls, specs: "list[DMCSpec]") -> "DMCSpec":
        """FullAttentionSpec's own would lose our fields."""
        if any(spec != specs[0] for spec in specs):
            raise ValueError(
                f"all layers of a model with DMC must have equal caches, got {sorted(set(map(str, specs)))}"
            )
        return specs[0]

    @property
    def prefix_cacheable(self) -> bool:
        return False

    def pages_to_begin(self, tokens: int) -> int:
        """Pages of every head's list that are no token's, and still to come once there were so many."""
        begins = cdiv(self.reserved_slots, self.block_size) if tokens <= self.local_window else 0
        return int(begins + (self.near_pages if tokens == 0 else 0))

    def blocks_of_a_request(self, ratio: float) -> int:
        """What a request of max_model_len tokens holds; one block is there for the next token."""
        return self.header_blocks + self.pages_to_begin(0) + 1 + int(cdiv(self.longest / ratio, self.block_size))

    @property
    def most_blocks(self) -> int:
        """That a request is granted at most: its pages, those that tokens in flight may round up to, and the next token's."""
        return self.near_pages + int(cdiv(self.longest + self.reserved_slots, self.block_size)) + 3

    def max_memory_usage_bytes(self, vllm_config: Any) -> int:
        """Of one sequence that never merges: it must fit, or alone in the pool it would be preempted for ever."""
        return self.blocks_of_a_request(1.0) * self.page_size_bytes

    def max_num_blocks_per_req(self, vllm_config: Any, max_len: int) -> int:
        """Never less than vLLM's own: it writes to a row as if every token had its slot."""
        return max(super().max_num_blocks_per_req(vllm_config, max_len), self.header_blocks)
