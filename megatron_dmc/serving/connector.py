"""The way between scheduler and workers: new blocks go there, real use comes back. No key or value is transferred."""

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

from vllm.distributed.kv_transfer.kv_connector.v1.base import (
    KVConnectorBase_V1,
    KVConnectorMetadata,
    KVConnectorWorkerMetadata,
    SupportsHMA,
)

from megatron_dmc.serving.metrics import DMCPromMetrics, DMCStats
from megatron_dmc.serving.plugin import logger
from megatron_dmc.serving.ratios import RATIO, THRESHOLD, TOKENS, Thresholds
from megatron_dmc.serving.spec import Changes, DMCManager, Report
from megatron_dmc.serving.worker_cache import WorkerCache


@dataclass
class Step(KVConnectorMetadata):
    """Down, before a step. ended: first blocks of requests that have ended since the step before. thresholds: above which the
    tokens of a request merge, by first blocks, of new requests and where another one holds from now on."""

    number: int
    changes: Changes
    ended: list[int]
    thresholds: dict[int, float]


@dataclass
class Used(KVConnectorWorkerMetadata):
    """Up, after a step. rows: layers times KV heads of those who report; reports: by requests' first blocks."""

    step: int
    rows: int
    reports: Mapping[int, Report]

    def aggregate(self, other: KVConnectorWorkerMetadata) -> "Used":
        """Ranks hold other heads or layers in the same blocks.

        vLLM may deliver a rank's report of a step with the others' of the next one. Then nothing is said of either: what
        one rank alone has used says too little to free a block, and what is not reported stays reserved.
        """
        assert isinstance(other, Used)
        if self.step != other.step:
            return Used(max(self.step, other.step), 0, {})
        reports = {
            first: Report(
                max(self.reports[first].blocks, other.reports[first].blocks),
                self.reports[first].slots + other.reports[first].slots,
                self.reports[first].overflows or other.reports[first].overflows,
            )
            for first in self.reports.keys() & other.reports.keys()
        }
        return Used(self.step, self.rows + other.rows, reports)


class DMCConnector(KVConnectorBase_V1, SupportsHMA):
    """vLLM makes one for the scheduler and one in each worker."""

    # Or a request's output would be held back when it is preempted.
    requires_kv_delivery = False
    manager: DMCManager
    thresholds: Thresholds
    cache: WorkerCache
    step: Step | None = None

    # Of the scheduler.
    def bind_kv_cache_manager(self, kv_cache_manager: Any) -> None:
        super().bind_kv_cache_manager(kv_cache_manager)
        (self.manager,) = kv_cache_manager.coordinator.single_type_managers
        self.thresholds = Thresholds.of(self._vllm_config.model_config.hf_config, self._vllm_config.additional_config)
        self._say_how_many_fit()

    def _say_how_many_fit(self) -> None:
        """vLLM's own line speaks of requests that merge nothing, which is the least."""
        model = self._vllm_config.model_config
        spec, ratio = self.manager.spec, float(model.hf_config.dmc["target_compression_ratio"])
        blocks = self.manager.block_pool.num_gpu_blocks - 1
        logger.info(
            "megatron-dmc: %s blocks of %d slots per KV head: %.2f requests of %s tokens at once without merging, about %.2f "
            "at the model's compression ratio of %g",
            *(f"{blocks:,}", spec.block_size, blocks / spec.blocks_of_a_request(1.0), f"{spec.longest:,}"),
            *(blocks / spec.blocks_of_a_request(ratio), ratio),
        )

    def build_connector_meta(self, scheduler_output: Any) -> Step:
        # In this order: a new request may have the name of one that has ended.
        self.thresholds.end(scheduler_output.finished_req_ids)
        for request in scheduler_output.scheduled_new_reqs:
            self.thresholds.begin(request.req_id, request.sampling_params and request.sampling_params.extra_args)
        requests = list(scheduler_output.num_scheduled_tokens)
        firsts = self.manager.first_blocks(requests)
        pool = self.manager.block_pool
        number, changes, ended = self.manager.start_step(requests)
        begun = {request for request, first in firsts.items() if changes[first][0] == 0}
        told = self.thresholds.step(firsts, begun, pool.get_num_free_blocks(), pool.num_gpu_blocks)
        return Step(number, changes, ended, told)

    def update_connector_output(self, connector_output: Any) -> None:
        used = connector_output.kv_connector_worker_meta
        if used is not None:
            self.manager.end_step(used.step, used.rows, used.reports)

    def has_pending_block_frees(self) -> bool:
        """Asked before a running request is preempted for want of blocks."""
        return self.manager.waits_for_reports

    def get_num_new_matched_tokens(self, request: Any, num_computed_tokens: int) -> tuple[int, bool]:
        return 0, False

    def update_state_after_alloc(self, request: Any, blocks: Any, num_external_tokens: int) -> None:
        pass

    def request_finished_all_groups(self, request: Any, block_ids: Any) -> tuple[bool, dict[str, float] | None]:
        """For the answer to a request that asked for a ratio (vLLM's ``kv_transfer_params``): its threshold, and the ratio of
        so many tokens as workers have reported on by now, all but the last step's."""
        threshold = self.thresholds.asked.get(request.request_id)
        if threshold is None:
            return False, None
        tokens, ratio = self.manager.reported(request.request_id)
        return False, {THRESHOLD: threshold, **({RATIO: ratio, TOKENS: tokens} if tokens else {})}

    # Of a worker.
    def register_kv_caches(self, kv_caches: Any) -> None:
        if hasattr(self, "cache"):
            raise RuntimeError(
                "megatron-dmc: a process can hold one engine with DMC, because vLLM gives all engines of a process the first "
                "one's connector; start another one in a process of its own"
            )
        layers = self._vllm_config.compilation_config.static_forward_context
        first = layers[next(iter(kv_caches))]
        spec = first.get_kv_cache_spec(self._vllm_config)
        self.cache = WorkerCache(kv_caches, first.header, spec, self._vllm_config.scheduler_config.max_num_seqs)
        for name in kv_caches:
            layers[name].cache = self.cache

    def bind_connector_metadata(self, connector_metadata: KVConnectorMetadata) -> None:
        """Before the forward pass: start_load_kv may come after it."""
        assert isinstance(connector_metadata, Step)
        super().bind_connector_metadata(connector_metadata)
        self.step = connector_metadata
        step = connector_metadata
        self.cache.begin_step(step.changes, step.ended, step.thresholds)

    def build_connector_worker_meta(self) -> Used | None:
        step, self.step = self.step, None
        if step is None or not step.changes:
            return None
        return Used(step.number, self.cache.rows, self.cache.reports())

    def start_load_kv(self, forward_context: Any, **kwargs: Any) -> None:
        pass

    def wait_for_layer_load(self, layer_name: str) -> None:
        pass

    def save_kv_layer(self, *args: Any, **kwargs: Any) -> None:
        pass

    def wait_for_save(self) -> None:
        pass

    # For people.
    def get_kv_connector_stats(self) -> DMCStats | None:
        return DMCStats(self.manager.figures()._asdict()) if hasattr(self, "manager") else None

    @classmethod
    def build_kv_connector_stats(cls, data: dict[str, Any] | None = None) -> DMCStats:
        return DMCStats(data or {})

    @classmethod
    def build_prom_metrics(cls, *args: Any, **kwargs: Any) -> DMCPromMetrics:
        return DMCPromMetrics(*args, **kwargs)
