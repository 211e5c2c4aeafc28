"""Lets megatron-core run without a GPU and its libraries: the one place here that patches anything.

megatron-core names CUDA in its code (``device="cuda"``, ``torch.cuda.synchronize()``, ``param.type() ==
"torch.cuda.FloatTensor"``) in many places that otherwise need no GPU. Where there is none, :func:`install` makes those
calls mean the CPU, so that the same trainer runs with the gloo backend. Nothing of megatron's source is edited.

The stubs are plain attributes, not a ``TorchFunctionMode``: a mode costs 2 to 3 microseconds at EVERY torch call and
attribute (on one core, torch 2.13), and it holds for one thread only. These cost nothing where CUDA is not named.
"""

import contextlib
import functools
import sys
from collections.abc import Callable, Iterator
from typing import Any

import torch
import torch.utils._device

_CPU = torch.device("cpu")

# Functions megatron-core calls with device="cuda" (or pin_memory=True, which needs a CUDA driver too).
_FACTORIES = (
    *("arange", "as_tensor", "empty", "full", "ones", "rand", "randint", "randn", "randperm", "tensor", "zeros"),
    *("empty_like", "full_like", "ones_like", "rand_like", "randn_like", "zeros_like"),
)


def install() -> None:
    """Makes megatron-core usable without CUDA; call it before anything of megatron is used.

    Does nothing where CUDA is available, and nothing the second time. Code that does not name CUDA is not affected.
    """
    if torch.cuda.is_available() or hasattr(torch.Tensor.cuda, "__wrapped__"):
        return
    _patch_factories()
    _patch_tensor()
    _patch_cuda_functions()
    _patch_random_state()


def install_adam() -> None:
    """Makes megatron-core build :class:`GroupAdamW` as it builds FusedAdam; call it before an optimizer is built.

    Does nothing where Transformer Engine or Apex is installed. Where neither is, with a GPU or without, megatron-core
    takes torch's AdamW, whose state its reshardable formats cannot hold; with this one it runs the same lines as with
    FusedAdam.
    """
    import megatron.core.optimizer as megatron_optimizer
    from megatron.core.optimizer import distrib_optimizer

    from megatron_dmc.distributed.adam import GroupAdamW

    if megatron_optimizer.USING_PYTORCH_OPTIMIZER:
        megatron_optimizer.Adam = distrib_optimizer.Adam = GroupAdamW
        megatron_optimizer.USING_PYTORCH_OPTIMIZER = False
        distrib_optimizer.HAVE_APEX_OR_TE = distrib_optimizer.USING_APEX_OPTIMIZER = True


def _patch_factories() -> None:
    # ``with torch.device(...)`` recognizes factories by identity, from a table built at first use: build it before
    # the names below mean something else, or tensors made under it would land on the wrong device.
    torch.utils._device._device_constructors()
    for name in _FACTORIES:
        factory = _on_cpu(getattr(torch, name))
        setattr(torch, name, factory)
        # torch.jit.script knows its built-ins by identity as well.
        torch.jit._builtins._register_builtin(factory, f"aten::{name}")


def _on_cpu(factory: Callable[..., torch.Tensor]) -> Callable[..., torch.Tensor]:
    """``factory`` with a CUDA ``device`` replaced by the CPU and ``pin_memory`` dropped."""

    @functools.wraps(factory)
    def on_cpu(*args: Any, **kwargs: Any) -> torch.Tensor:
        device = kwargs.get("device")
        # A bare number names a CUDA device as well.
        if device is not None and (isinstance(device, int) or torch.device(device).type == "cuda"):
            kwargs["device"] = _CPU
        if kwargs.get("pin_memory"):
            kwargs["pin_memory"] = False
        return factory(*args, **kwargs)

    return on_cpu


def _patch_tensor() -> None:
    """``Tensor.cuda()`` and ``Tensor.type()``."""
    tensor_type = torch.Tensor.type

    @functools.wraps(torch.Tensor.cuda)
    def cuda(self: torch.Tensor, *args: Any, **kwargs: Any) -> torch.Tensor:
        return self

    # The optimizer and gradient clipping sort tensors by type() == "torch.cuda.FloatTensor" and refuse all others. Only
    # megatron's own code may see that name: safetensors, transformers and TensorBoard rely on the true one.
    @functools.wraps(tensor_type)
    def type_(self: torch.Tensor, *args: Any, **kwargs: Any) -> Any:
        result = tensor_type(self, *args, **kwargs)
        if not args and not kwargs and sys._getframe(1).f_globals.get("__name__", "").startswith("megatron.core."):
            return result.replace("torch.", "torch.cuda.", 1)
        return result

    torch.Tensor.cuda = cuda  # type: ignore[method-assign, assignment]
    torch.Tensor.type = type_  # type: ignore[method-assign, assignment]


def _patch_cuda_functions() -> None:
    # current_device() is what most of megatron's tensors are created on; torch takes a torch.device wherever it takes
    # the index that CUDA would give.
    torch.cuda.current_device = lambda: _CPU  # type: ignore[assignment, return-value]
    # Every stub below is an object of its own: torch._dynamo keeps a table by identity and refuses the same one twice.
    # One rank, one CPU: there is no device to choose, wait for, or empty.
    for name in ("set_device", "synchronize", "empty_cache"):
        setattr(torch.cuda, name, _do_nothing())
    # schedules and activation recomputation mark ranges for the profiler.
    torch.cuda.nvtx.range_push = _do_nothing()
    torch.cuda.nvtx.range_pop = _do_nothing()
    # Work on a CPU is done when the call returns, so a stream or an event has nothing to order.
    for name in ("current_stream", "default_stream", "Stream", "Event"):
        setattr(torch.cuda, name, type(name, (_AlwaysDone,), {}))
    torch.cuda.stream = lambda stream: contextlib.nullcontext()  # type: ignore[assignment, return-value]


@contextlib.contextmanager
def tensors_on(device: torch.device) -> Iterator[None]:
    """Inside, what megatron-core makes for itself is made on ``device`` (the meta device, say); after :func:`install`."""
    before = torch.cuda.current_device
    torch.cuda.current_device = lambda: device  # type: ignore[assignment, return-value]
    try:
        yield
    finally:
        torch.cuda.current_device = before


def _patch_random_state() -> None:
    """megatron's tracker of random states saves and restores the CUDA generator: let it be the CPU's."""
    torch.cuda.manual_seed = lambda seed: torch.manual_seed(seed)  # type: ignore[assignment]
    torch.cuda.get_rng_state = lambda device=None: torch.get_rng_state()
    torch.cuda.set_rng_state = lambda new_state, device=None: torch.set_rng_state(new_state)

    # These two reach below torch.cuda's public functions. Imported here, because this module comes before megatron.
    import megatron.core.tensor_parallel.random as megatron_random

    def get_rng_state(device: Any = None, clone: bool = False, graph_safe: bool = False) -> torch.Tensor:
        return torch.get_rng_state()

    def set_rng_state(new_state: torch.Tensor, device: Any = None, graph_safe: bool = False) -> None:
        torch.set_rng_state(new_state)

    megatron_random._get_cuda_rng_state = get_rng_state
    megatron_random._set_cuda_rng_state = set_rng_state


def _do_nothing() -> Callable[..., None]:
    def do_nothing(*args: Any, **kwargs: Any) -> None:
        pass

    return do_nothing


class _AlwaysDone:
    """Stands for a CUDA stream or event on a machine where every call is finished when it returns."""

    def __init__(self, *args: Any, **kwargs: Any) -> None:
        pass

    def elapsed_time(self, end: object) -> float:
        return 0.0

    record_event = record = wait = wait_stream = wait_event = synchronize = _do_nothing()
