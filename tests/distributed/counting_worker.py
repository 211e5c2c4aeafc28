"""A worker of the cluster check that counts what a step sends: over two steps before anything merges and three after."""

import sys
from collections import Counter
from typing import Any

import torch
from torch.utils._python_dispatch import TorchDispatchMode

from megatron_dmc.cluster_check import worker
from megatron_dmc.cluster_check.cases import Case
from megatron_dmc.training.schedule import StepPlan
from megatron_dmc.training.trainer import StepResult

BEFORE_MERGING = 2
_PHASES = [
    {"kind": "zero_out", "steps": BEFORE_MERGING, "lr": 1e-3},
    {"kind": "compress", "steps": 3, "lr": 1e-3},
]
CASE = Case("counted", {"dmc.decision_source": "neuron", "phases": _PHASES})


class Messages(TorchDispatchMode):
    """Counts calls of torch.distributed, by operation and bytes."""

    def __init__(self) -> None:
        super().__init__()
        self.counts: Counter[str] = Counter()

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        if func.namespace == "c10d":
            tensors = [args[0]] if isinstance(args[0], torch.Tensor) else list(args[0])
            name = func.overloadpacket.__name__
            self.counts[f"{name} {sum(x.nbytes for x in tensors if isinstance(x, torch.Tensor))}"] += 1
        return func(*args, **(kwargs or {}))


class CountingTrainer(worker.RecordingTrainer):
    """Adds to every recorded step what was sent in its forward and backward passes, and in the whole step."""

    def _train_step(self, plan: StepPlan) -> StepResult:
        with Messages() as self.whole:
            return super()._train_step(plan)

    def _forward_backward(self, *arguments: Any, **keywords: Any) -> Any:
        with Messages() as self.inside:
            return super()._forward_backward(*arguments, **keywords)

    def _record(self, plan: StepPlan, result: StepResult, learning_rate: float, seconds: float) -> Any:
        record = super()._record(plan, result, learning_rate, seconds)
        self.steps[-1] |= {"merging": plan.merging, "inside": self.inside.counts, "whole": self.whole.counts}
        return record


if __name__ == "__main__":
    worker.main(sys.argv[1:], CountingTrainer, [CASE])
