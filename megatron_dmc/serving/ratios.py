"""Which merge threshold each request has: the model's, one that it asks for, or a lower one while the pool is short."""

from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from typing import Any

from megatron_dmc.hf.curve import CompressionCurve, check_threshold
from megatron_dmc.serving.plugin import logger

# A request's extra arguments (vllm_xargs of vLLM's server, extra_args of its SamplingParams).
RATIO, THRESHOLD = "compression_ratio", "merge_threshold"
# In its answer, beside the ratio: of so many of its tokens.
TOKENS = "compressed_tokens"
# Of vLLM's --additional-config.
UNDER_LOAD = "dmc_under_load"
# Steps in which a threshold moves as the pool fills, so that workers are told of few changes.
_LEVELS = 16


@dataclass(frozen=True)
class UnderLoad:
    """Requests that ask for no ratio are compressed harder while few blocks are free: from their next token on.

    Attributes:
        free_share: of the pool's blocks, below which it begins.
        compression_ratio: what they are compressed to when none is left. It is never exceeded, for quality's sake.
    """

    free_share: float
    compression_ratio: float

    @classmethod
    def of(cls, values: Any) -> "UnderLoad | None":
        """From ``--additional-config``; raises ValueError, one line, for what is none of these settings."""
        if values is None:
            return None
        if not isinstance(values, Mapping) or set(values) != {"free_share", "compression_ratio"}:
            raise ValueError(
                f"--additional-config: {UNDER_LOAD} must have free_share and compression_ratio, got {values!r:.200}"
            )
        share, ratio = (
            check_threshold(f"--additional-config: {UNDER_LOAD}.{name}", values[name])
            for name in ("free_share", "compression_ratio")
        )
        if not 0 < share <= 1:
            raise ValueError(
                f"--additional-config: {UNDER_LOAD}.free_share must be above 0 and at most 1, got {share:g}"
            )
        return cls(share, ratio)

    def pressure(self, free: int, blocks: int) -> float:
        """From 0, enough blocks are free, to 1, none is; in a few levels."""
        part = max(0.0, 1 - free / (self.free_share * blocks))
        return round(part * _LEVELS) / _LEVELS


class Thresholds:
    """Of the scheduler.

    Args:
        own: the model's merge threshold.
        curve: which threshold gives which ratio; None: not measured.
        under_load: None: thresholds stay.

    Raises:
        ValueError: the curve does not reach what ``under_load`` asks for.
    """

    def __init__(self, own: float, curve: CompressionCurve | None, under_load: UnderLoad | None):
        self.own, self.curve, self.under_load = own, curve, under_load
        self.asked: dict[str, float] = {}
        # What the workers know, by requests.
        self._told: dict[str, float] = {}
        self._warned: set[str] = set()
        if under_load is not None:
            if curve is None:
                raise ValueError(
                    f"--additional-config: {UNDER_LOAD} needs a measured curve; run megatron-dmc ratios on the export first"
                )
            try:
                self._pressed = curve.threshold(under_load.compression_ratio)
            except ValueError as error:
                raise ValueError(f"--additional-config: {UNDER_LOAD}.{error}") from None

    @classmethod
    def of(cls, hf_config: Any, additional: Any) -> "Thresholds":
        """From an export's configuration and vLLM's --additional-config."""
        curve = getattr(hf_config, "compression_curve", None)
        values = additional.get(UNDER_LOAD) if isinstance(additional, Mapping) else None
        return cls(
            check_threshold("merge_threshold", getattr(hf_config, "merge_threshold", 0.0)),
            None if curve is None else CompressionCurve.from_dict(curve),
            UnderLoad.of(values),
        )

    def begin(self, request_id: str, extra: Mapping[str, Any] | None) -> None:
        """Takes in what a new request asks for. vLLM lets no plugin refuse a request: what cannot be had is served as near to
        it as can be, and the log says so."""
        threshold = self._asked(extra or {})
        if threshold is not None:
            self.asked[request_id] = threshold

    def end(self, request_ids: Iterable[str]) -> None:
        for request_id in request_ids:
            self.asked.pop(request_id, None)
            self._told.pop(request_id, None)

    def step(self, firsts: Mapping[str, int], begun: set[str], free: int, blocks: int) -> dict[int, float]:
        """What the workers have to be told before a step, by first blocks.

        Args:
            firsts: first block of each request that has tokens in the step.
            begun: those of them that the workers do not know yet, or not since they were preempted.
            free, blocks: of the pool.
        """
        usual = self._usual(free, blocks)
        told = {}
        for request_id, first in firsts.items():
            threshold = self.asked.get(request_id, usual)
            if request_id in begun or self._told.get(request_id) != threshold:
                told[first] = self._told[request_id] = threshold
        return told

    def _usual(self, free: int, blocks: int) -> float:
        """Of requests that ask for nothing."""
        if self.under_load is None or self._pressed >= self.own:
            return self.own
        return self.own + self.under_load.pressure(free, blocks) * (self._pressed - self.own)

    def _asked(self, extra: Mapping[str, Any]) -> float | None:
        if RATIO in extra and THRESHOLD in extra:
            self._warn(f"a request gave both {RATIO} and {THRESHOLD}: the threshold is taken")
        if THRESHOLD in extra:
            try:
                return check_threshold(THRESHOLD, extra[THRESHOLD])
            except ValueError as error:
                self._warn(f"{error}; the request is compressed as the model was trained")
                return None
        if RATIO not in extra:
            return None
        try:
            ratio = check_threshold(RATIO, extra[RATIO])
        except ValueError:
            ratio = 0.0
        if ratio < 1:
            self._warn(
                f"{RATIO} must be a number from 1 on, got {extra[RATIO]!r:.100}; the request is compressed as the model was "
                "trained"
            )
            return None
        if self.curve is None:
            self._warn(
                f"a request asks for a {RATIO}, and it has not been measured which threshold gives it: it is compressed as "
                "the model was trained; run megatron-dmc ratios on the export"
            )
            return None
        nearest = min(max(ratio, self.curve.ratios[0]), self.curve.ratios[-1])
        if nearest != ratio:
            self._warn(f"{RATIO} {ratio:g} was not measured; the request gets {nearest:.3g}, the nearest that was")
        return self.curve.threshold(nearest)

    def _warn(self, line: str) -> None:
        """Once for each line: requests come by the thousand."""
        if line not in self._warned and len(self._warned) < 100:
            self._warned.add(line)
            logger.warning("megatron-dmc: %s", line)
