"""The kernels that a GPU takes, where the meta device would take an operation apart and keep its pieces."""

import functools
from collections.abc import Callable
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.overrides import TorchFunctionMode

from megatron_dmc.model.attention import DMCCoreAttention

aten = torch.ops.aten


def use_stock_kernels(chunk: torch.nn.Module) -> None:
    """Lets a chunk's norms and plain attention run as one fused operation each, also while they are recomputed."""
    for module in chunk.modules():
        if isinstance(module, (torch.nn.RMSNorm, DMCCoreAttention)):
            setattr(module, "forward", _fused(module.forward))  # noqa: B010 (a method, to a type checker)


def _fused(forward: Callable[..., Tensor]) -> Callable[..., Tensor]:
    @functools.wraps(forward)
    def inside(*args: Any, **kwargs: Any) -> Tensor:
        # Here and not around the whole pass: autograd runs a backward pass, and so recomputation, without the mode.
        with _Fused():
            return forward(*args, **kwargs)

    return inside


class _Fused(TorchFunctionMode):
    def __torch_function__(
        self, func: Callable[..., Any], types: Any, args: tuple[Any, ...] = (), kwargs: dict[str, Any] | None = None
    ) -> Any:
        fused: dict[Any, Callable[..., Any]] = {F.rms_norm: _rms_norm, F.scaled_dot_product_attention: _attention}
        replacement = fused.get(func, func)
        return replacement(*args, **(kwargs or {}))


def _rms_norm(x: Tensor, shape: Any, weight: Tensor | None = None, eps: float | None = None) -> Tensor:
    return aten._fused_rms_norm(x, shape, weight, eps)[0]


def _attention(
    query: Tensor, key: Tensor, value: Tensor, *, is_causal: bool, scale: float | None, enable_gqa: bool
) -> Tensor:
    return aten._scaled_dot_product_flash_attention_for_cpu(query, key, value, 0.0, is_causal, scale=scale)[0]
