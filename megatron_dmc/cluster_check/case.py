"""The retrofits that are compared, by name. Nothing here needs torch: the command's help names them."""

from dataclasses import dataclass, field
from typing import Any, Literal


@dataclass(frozen=True)
class Case:
    """A retrofit to compare.

    Attributes:
        overrides: ``section.field`` to value.
    """

    name: str
    overrides: dict[str, Any] = field(default_factory=dict)

    @property
    def precision(self) -> Literal["fp32", "bf16", "fp8"]:
        if "training.fp8" in self.overrides:
            return "fp8"
        return "bf16" if self.overrides.get("training.bf16") else "fp32"


CASES = [
    Case("projection"),
    # The gate closes and opens again within the steps.
    Case(
        "neuron",
        {"dmc.decision_source": "neuron", "dmc.target_compression_ratio": 1.6, "phases.0.start_compression_ratio": 1.0},
    ),
    Case(
        "window, distilled",
        {"dmc.local_window": 4, "distillation.weight": 0.5, "distillation.top_k": 20},
    ),
    Case(
        "eviction, adapter, distilled",
        {
            "dmc.local_window": 4,
            "dmc.operation": "evict",
            "training.train": "adapter",
            "distillation.weight": 1.0,
            "distillation.direction": "reverse",
        },
    ),
    Case("DMC-C, tied embeddings", {"dmc.per_layer": True, "model.share_embeddings_and_output_weights": True}),
    Case(
        "packed documents, window",
        {"data.reset_at_documents": True, "data.repeat_fraction": 0.5, "dmc.local_window": 4},
    ),
    Case(
        "absorbing, packed documents",
        {"data.reset_at_documents": True, "dmc.local_window": 4, "dmc.operation": "absorb"},
    ),
    Case(
        "Qwen2, neuron",
        {"model.family": "qwen2", "dmc.decision_source": "neuron", "phases.0.start_compression_ratio": 1.0},
    ),
    # With the decisions' channel half in the norms of heads, then out of them.
    Case(
        "Qwen3, zero_out, neuron",
        {
            "model.family": "qwen3",
            "dmc.decision_source": "neuron",
            "phases": [
                {"kind": "zero_out", "steps": 3, "lr": 1e-3},
                {"kind": "compress", "steps": 3, "lr": 1e-3, "start_compression_ratio": 1.0},
            ],
        },
    ),
    Case("bf16", {"training.bf16": True}),
    Case(
        "calibrated",
        {
            "dmc.local_window": 4,
            "dmc.operation": "evict",
            "data.reset_at_documents": True,
            "training.train": "adapter",
            "dmc.ratio_control": "offset",
            "dmc.target_compression_ratio": 2.0,
            "phases": [{"kind": "calibrate", "steps": 5}, {"kind": "solidify", "steps": 3, "lr": 1e-2}],
        },
    ),
]
# Attention on a GPU is bf16 in any case.
GPU_CASES = [Case(case.name, case.overrides | {"training.bf16": True}) for case in CASES if case.precision == "fp32"]
FP8 = Case("FP8", {"training.bf16": True, "training.fp8": "hybrid"})
