"""What must change nothing: parallel layouts, micro-batch sizes, recomputation."""

from dataclasses import dataclass, field
from typing import Any

REFERENCE = "one process"
# The most GPUs that a layout needs, and the processes that a CPU runs.
MOST_GPUS, CPU_PROCESSES = 16, 8


@dataclass(frozen=True)
class Layout:
    """Settings over a case's recipe that leave its result as it is.

    Attributes:
        overrides: ``section.field`` to value.
    """

    name: str
    processes: int = 1
    overrides: dict[str, Any] = field(default_factory=dict)


def all_layouts(most_processes: int = 8) -> list[Layout]:
    """The reference first. The last has 2 replicas of TP2xPP2, or 4 on 16 processes; 3 could not share a case's batch."""
    replicas = 4 if most_processes >= 16 else 2
    overlapped = {"parallel.use_distributed_optimizer": True, "parallel.overlap": True}
    sequence = _tensor(2) | {"parallel.sequence_parallel": True}
    return [
        Layout(REFERENCE),
        Layout("micro-batch 1", overrides={"training.micro_batch_size": 1}),
        Layout("micro-batch 4", overrides={"training.micro_batch_size": 4}),
        Layout("selective recompute", overrides={"training.recompute": "selective"}),
        Layout("full recompute", overrides={"training.recompute": "full"}),
        Layout("TP2", 2, _tensor(2)),
        Layout("TP2+SP", 2, sequence),
        Layout("TP2+SP, selective recompute", 2, sequence | {"training.recompute": "selective"}),
        Layout("PP2", 2, _pipeline(2)),
        Layout("PP2xVPP2", 2, _pipeline(2, 2)),
        Layout("PP2xVPP2, full recompute", 2, _pipeline(2, 2) | {"training.recompute": "full"}),
        Layout("CP2", 2, _context(2)),
        Layout("CP2, a2a", 2, _context(2) | {"parallel.cp_comm_type": "a2a"}),
        Layout("DP2", 2),
        Layout("DP2, distributed optimizer, overlap", 2, overlapped),
        Layout("TP2xPP2", 4, _tensor(2) | _pipeline(2)),
        Layout("CP2xTP2+SP", 4, _context(2) | sequence),
        Layout(f"TP2xPP2xDP{replicas}", 4 * replicas, sequence | _pipeline(2) | overlapped),
    ]


def _tensor(size: int) -> dict[str, Any]:
    return {"parallel.tensor_model_parallel_size": size}


def _pipeline(size: int, virtual: int | None = None) -> dict[str, Any]:
    return {
        "parallel.pipeline_model_parallel_size": size,
        "parallel.virtual_pipeline_model_parallel_size": virtual,
    }


def _context(size: int) -> dict[str, Any]:
    return {"parallel.context_parallel_size": size}
