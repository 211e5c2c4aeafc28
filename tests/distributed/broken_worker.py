"""A worker of the cluster check with a fault in it; the first argument says which."""

import dataclasses
import sys
from typing import Any

import torch.distributed as dist
from megatron.core import parallel_state

from megatron_dmc.cluster_check import worker
from megatron_dmc.model.compression_loss import merge_fraction_target
from megatron_dmc.training.trainer import StepResult


class NoiseByRank(worker.RecordingTrainer):
    """Every rank draws noise of its own."""

    def __init__(self, *arguments: Any) -> None:
        super().__init__(*arguments)
        for layer in self._layers():
            layer.dmc = dataclasses.replace(layer.dmc, seed=layer.dmc.seed + dist.get_rank())


class LossPerShard(worker.RecordingTrainer):
    """Every tensor-parallel rank closes its gate by the decisions of its own heads."""

    def _reduce(self, outputs: Any) -> StepResult:
        counts = [layer.statistics.total().sum(1) for layer in self._layers()]
        merged, tokens = (sum(int(count[i]) for count in counts) for i in (1, 2))
        self.own_fraction = merged / tokens
        return super()._reduce(outputs)

    def _alpha_gradient(self, plan: Any, micro_batches: Any) -> float:
        target = merge_fraction_target(plan.target_compression_ratio)
        # An open gate gives the gradient's size, which is the same on all ranks.
        self.merge_fraction = 0.0
        gradient = super()._alpha_gradient(plan, micro_batches)
        return gradient if getattr(self, "own_fraction", 0.0) < target else 0.0


class SharedInterleavedMessages(worker.RecordingTrainer):
    """Virtual stages with megatron-core's default of one batched message both ways."""

    def __init__(self, *arguments: Any) -> None:
        super().__init__(*arguments)
        if parallel_state.get_virtual_pipeline_model_parallel_world_size() is not None:
            self.config.overlap_p2p_comm, self.config.batch_p2p_comm = False, True


class LostRank(worker.RecordingTrainer):
    """One of two tensor-parallel ranks fails in the second step, and the other waits for it."""

    def _train_step(self, plan: Any) -> StepResult:
        if self.step == 1 and parallel_state.get_tensor_model_parallel_rank() == 1:
            raise RuntimeError("this rank fails on purpose")
        return super()._train_step(plan)


FAULTS = {"lost rank": LostRank, "noise": NoiseByRank, "loss": LossPerShard, "messages": SharedInterleavedMessages}

if __name__ == "__main__":
    worker.main(sys.argv[2:], FAULTS[sys.argv[1]])
