"""An optimizer's state as checkpoints hold it: named by the parameters' global names, whoever saves or loads it.

megatron-core's optimizers (plain in fp32 or bf16, distributed) save the same tensors under one of several structures. Only
the tensors go into a checkpoint, and with them Adam's step count, the one other thing that a run cannot compute: rates,
betas and weight decay are the recipe's. So the state is loaded in any layout and by any of them. (megatron-core looks
loaded parameter groups up by values that a schedule changes, in 0.19 by ``max_lr`` and ``min_lr``; the groups here are
always the optimizer's own.)

Main parameters, in fp32 beside a bf16 model, are saved under one name. In an fp32 model they are the weights themselves,
and are not saved again.
"""

from collections.abc import Iterator
from typing import Any

import torch
from megatron.core.dist_checkpointing.dict_utils import dict_list_map_inplace, nested_values
from megatron.core.dist_checkpointing.mapping import LocalNonpersistentObject, ShardedBase
from megatron.core.optimizer import MegatronOptimizer

_PREFIX = "optimizer.state."
_MAIN_PARAMETER = _PREFIX + "param."
# The plain bf16 optimizer's name for it.
_FP32_PARAMETER = _PREFIX + "fp32_param."


class OptimizerState:
    """The state of an optimizer over the parameters of ``model_state``, for one save or one load.

    Args:
        model_state: the model's sharded state dict.
        is_loading: the tensors are to be filled, then taken back with :meth:`load`.
    """

    def __init__(self, optimizer: MegatronOptimizer, model_state: dict[str, Any], *, is_loading: bool = False) -> None:
        self._optimizer = optimizer
        self._structure = optimizer.sharded_state_dict(
            model_state,
            is_loading=is_loading,
            metadata={
                # Whole tensors, gathered on the first data-parallel rank by way of the host.
                "distrib_optim_sharding_type": "fully_reshardable",
                "distrib_optim_fully_reshardable_mem_efficient": True,
                "chained_optim_avoid_prefix": True,
            },
        )
        entries = [entry for entry in nested_values(self._structure) if isinstance(entry, ShardedBase)]
        for entry in entries:
            if entry.key.startswith(_FP32_PARAMETER):
                entry.key = _MAIN_PARAMETER + entry.key.removeprefix(_FP32_PARAMETER)
        # Keys are not unique on a rank (layers are slices of one tensor), and the names here are not saved.
        self._tensors = {
            id(entry): entry for entry in entries if optimizer.config.bf16 or not entry.key.startswith(_MAIN_PARAMETER)
        }

    def state_dict(self) -> dict[str, Any]:
        """Entries of a checkpoint's sharded state dict."""
        # A rank that writes none has no entry: an empty one would be a plain value, which megatron-core wants on all ranks.
        tensors = {"optimizer": self._tensors} if self._tensors else {}
        return {**tensors, "adam_step": _step(self._optimizer)}

    @torch.no_grad()
    def load(self, loaded: dict[str, Any]) -> None:
        """Puts :meth:`state_dict`'s entries, loaded, into the optimizer; the model's weights must be loaded already."""

        def fill(value: Any) -> Any:
            if isinstance(value, ShardedBase):
                return loaded.get("optimizer", {}).get(id(value))
            return value.unwrap() if isinstance(value, LocalNonpersistentObject) else value

        dict_list_map_inplace(fill, self._structure)
        if not self._optimizer.config.bf16 and self._optimizer.config.use_distributed_optimizer:
            for tensors, parameter in zip(self._structure["param_state"].values(), self._parameters(), strict=True):
                tensors["param"] = parameter.detach()
        self._optimizer.load_state_dict(self._structure)
        for group in self._optimizer.param_groups:
            group["step"] = loaded["adam_step"]

    def _parameters(self) -> Iterator[torch.nn.Parameter]:
        """The model's, in the order in which the distributed optimizer's state lists them."""
        for part in self._optimizer.chained_optimizers:
            for buffer in part.buffers:
                yield from buffer.param_index_map


def _step(optimizer: MegatronOptimizer) -> int:
    """Updates since Adam started; groups that are empty on this rank do not count them."""
    return max((int(group.get("step", 0)) for group in optimizer.param_groups), default=0)
