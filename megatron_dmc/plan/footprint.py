"""What one micro-batch leaves in memory and sends, seen while a chunk really runs it forward and backward."""

import weakref
from collections import defaultdict
from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any

import torch
import torch.distributed as dist
from megatron.core import parallel_state
from megatron.core.utils import get_attr_wrapped_model
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_iter

from megatron_dmc.plan.workspace import attention_workspace
from megatron_dmc.recipe import Recipe
from megatron_dmc.training.forward_step import DistillationStep, forward_step

c10d = torch.ops.c10d


@dataclass(frozen=True)
class Footprint:
    """One micro-batch on one chunk.

    Attributes:
        kept: bytes held between its forward and its backward pass: what autograd saves, the output, and what arrived.
        working: bytes on top of those, at the worst moment of the two passes, a GPU's attention kernels included.
        sent: bytes that this rank sends to the others of its ``tensor`` and ``context`` parallel groups in both passes.
    """

    kept: int
    working: int
    sent: dict[str, float]


def run_micro_batch(
    recipe: Recipe,
    chunk: torch.nn.Module,
    teacher: torch.nn.Module | None,
    device: torch.device,
    *,
    receives: bool,
) -> Footprint:
    """Runs the training's own forward step and its backward pass on tensors without meaning.

    Args:
        chunk: of this rank's model; megatron-core's parallel state must be initialized.
        teacher: its counterpart of a second, frozen copy.
        device: where the chunk's parameters are: meta, or a real one for small models.
        receives: whether a pipeline stage before it sends the hidden states.
    """
    step: Any = forward_step
    if recipe.distills:
        step = DistillationStep(recipe.distillation, [chunk], None if teacher is None else [teacher])
    batch = _batch(recipe, device)
    received = _received(recipe, device) if receives else None
    get_attr_wrapped_model(chunk, "set_input_tensor")(received)
    hooks = [
        parameter.register_post_accumulate_grad_hook(_drop_gradient)
        for parameter in chunk.parameters()
        if parameter.requires_grad
    ]
    arrived = 0 if received is None else received.nbytes
    with _Watch(_windowed_tokens(recipe)) as watch:
        output, loss = step(iter([batch]), chunk)
        if get_attr_wrapped_model(chunk, "post_process"):
            output = loss(output)[0]
        # megatron-core gathers sequence shards into buffers that it makes once.
        buffers = sum(buffer.nbytes for buffer in parallel_state.get_global_memory_buffer().buffer.values())
        kept = watch.live - buffers
        torch.autograd.backward(output, grad_tensors=torch.empty_like(output))
    for hook in hooks:
        hook.remove()
    return Footprint(kept + arrived, watch.peak - kept + arrived, dict(watch.sent))


def _windowed_tokens(recipe: Recipe) -> int:
    """Queries that one attention kernel takes over the local window: of all samples, or under context parallelism of one of
    a rank's two chunks, with those that fill the first window."""
    ranks, samples = recipe.parallel.context_parallel_size, recipe.training.micro_batch_size
    if ranks == 1:
        return samples * recipe.data.sequence_length
    return samples * (recipe.data.sequence_length // (2 * ranks) + recipe.dmc.local_window - 1)


def _drop_gradient(parameter: Tensor) -> None:
    # megatron-core's DDP adds it to its own buffer and does the same.
    parameter.grad = None


def _batch(recipe: Recipe, device: torch.device) -> dict[str, Tensor]:
    size = recipe.training.micro_batch_size
    seq = recipe.data.sequence_length // recipe.parallel.context_parallel_size
    ids = torch.zeros(size, seq, dtype=torch.int64, device=device)
    return {
        "tokens": ids,
        "position_ids": ids,
        "labels": ids,
        "sample_index": ids[:, 0].contiguous(),
        "loss_mask": torch.ones(size, seq, device=device),
    }


def message_shape(recipe: Recipe) -> tuple[int, int, int]:
    """Hidden states between pipeline stages, [seq, batch, hidden] of one rank; teacher and student travel side by side."""
    parallel = recipe.parallel
    seq = recipe.data.sequence_length // parallel.context_parallel_size
    if parallel.sequence_parallel:
        seq //= parallel.tensor_model_parallel_size
    streams = 2 if recipe.distills else 1
    return seq, streams * recipe.training.micro_batch_size, recipe.model.hidden_size


def _received(recipe: Recipe, device: torch.device) -> Tensor:
    dtype = torch.bfloat16 if recipe.training.bf16 else torch.float32
    return torch.zeros(message_shape(recipe), dtype=dtype, device=device, requires_grad=True)


@dataclass
class _Watch(TorchDispatchMode):
    """Bytes of the tensors that were made inside and still live, and what collectives send (as rings)."""

    windowed_tokens: int
    live: int = 0
    peak: int = 0
    sent: defaultdict[str, float] = field(default_factory=lambda: defaultdict(float))

    def __post_init__(self) -> None:
        super().__init__()
        self._seen: weakref.WeakSet[Any] = weakref.WeakSet()
        self._groups = {
            parallel_state.get_tensor_model_parallel_group().group_name: "tensor",
            parallel_state.get_context_parallel_group().group_name: "context",
        }

    def __torch_dispatch__(
        self, func: Any, types: Any, args: tuple[Any, ...] = (), kwargs: dict[str, Any] | None = None
    ) -> Any:
        arguments = {id(x.untyped_storage()) for x in tree_iter((args, kwargs)) if isinstance(x, Tensor)}
        result = func(*args, **(kwargs or {}))
        for tensor in tree_iter(result):
            if isinstance(tensor, Tensor):
                self._add(tensor.untyped_storage(), arguments)
        self.peak = max(self.peak, self.live + attention_workspace(func, args, kwargs or {}, self.windowed_tokens))
        if func in _SENT:
            self._count(func, args)
        return result

    def _add(self, storage: Any, arguments: set[int]) -> None:
        if storage in self._seen or id(storage) in arguments:
            return
        self._seen.add(storage)
        size = storage.nbytes()
        self.live += size
        self.peak = max(self.peak, self.live)
        weakref.finalize(storage, self._remove, size)

    def _remove(self, size: int) -> None:
        self.live -= size

    def _count(self, func: Any, args: tuple[Any, ...]) -> None:
        tensors, group, share = _SENT[func]
        ranks = dist.ProcessGroup.unbox(args[group])
        size = sum(x.nbytes for x in tree_iter(args[tensors]) if isinstance(x, Tensor))
        if ranks.size() > 1 and ranks.group_name in self._groups:
            self.sent[self._groups[ranks.group_name]] += size * share(ranks.size())


def _ring(ranks: int) -> float:
    return (ranks - 1) / ranks


# Which argument holds the whole tensor, which the group, and the part of the whole that every rank sends.
_SENT: dict[Any, tuple[int, int, Callable[[int], float]]] = {
    c10d.allreduce_.default: (0, 1, lambda ranks: 2 * _ring(ranks)),
    c10d._allgather_base_.default: (0, 2, _ring),
    c10d._reduce_scatter_base_.default: (1, 2, _ring),
    c10d.allgather_.default: (0, 2, _ring),
    c10d.reduce_scatter_.default: (1, 2, _ring),
    c10d.alltoall_.default: (1, 2, _ring),
    c10d.alltoall_base_.default: (1, 2, _ring),
    c10d.send.default: (0, 1, lambda ranks: 1.0),
}
