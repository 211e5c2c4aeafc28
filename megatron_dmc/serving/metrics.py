"""What ``/metrics`` and vLLM's log say of the slots: gauges of the scheduler's figures."""

from typing import Any

from vllm.distributed.kv_transfer.kv_connector.v1.metrics import KVConnectorPromMetrics, KVConnectorStats

# Names of spec.Figures' fields, under which they travel.
GAUGES = {
    "compression_ratio": "Tokens per cache slot of running requests, averaged over the last steps.",
    "slots_used": "Cache slots of running requests, of all layers and KV heads.",
    "cells_free": "Pages of block_size cache slots of one KV head that no request holds.",
    "most_requests": "Requests of max_model_len tokens that fit at once at that compression ratio.",
}


class DMCStats(KVConnectorStats):
    """The newest figures; ``data`` has the keys of GAUGES, or is empty."""

    data: dict[str, Any]

    def reset(self) -> None:
        self.data = {}

    def aggregate(self, other: KVConnectorStats) -> "DMCStats":
        return DMCStats(other.data or self.data)

    def reduce(self) -> dict[str, int | float]:
        """For vLLM's line of every ten seconds."""
        return {name: round(value, 2) for name, value in self.data.items()}

    def is_empty(self) -> bool:
        return not self.data


class DMCPromMetrics(KVConnectorPromMetrics):
    """Gauges ``vllm:dmc_...``, one series per engine. Arguments: vLLM's."""

    def __init__(
        self, vllm_config: Any, metric_types: Any, labelnames: list[str], per_engine_labelvalues: dict[int, Any]
    ):
        super().__init__(vllm_config, metric_types, labelnames, per_engine_labelvalues)
        self.gauges = {}
        for name, text in GAUGES.items():
            gauge = self._gauge_cls(
                name=f"vllm:dmc_{name}", documentation=text, labelnames=labelnames, multiprocess_mode="mostrecent"
            )
            self.gauges[name] = {engine: gauge.labels(*values) for engine, values in per_engine_labelvalues.items()}

    def observe(self, transfer_stats_data: dict[str, Any], engine_idx: int = 0) -> None:
        for name, value in transfer_stats_data.items():
            self.gauges[name][engine_idx].set(value)
