"""The kernels that a GPU takes, where the meta device would take an operation apart and keep its pieces."""

import functools
from collections.abc import Callable
from typing import Any

import torch
import torch.nn.functional as F
from megatron.core.transformer.module import Float16Module
from torch import Tensor
from torch.overrides import TorchFunctionMode

from megatron_dmc.model.attention import DMCCoreAttention

aten = torch.ops.aten


def use_stock_kernels(chunk: torch.nn.Module) -> None:
    """Lets a chunk's norms and plain attention run as one fused operation each, also while they are recomputed, and a last
    stage give its results in float32 where the forward step wants them so."""
    for module in chunk.modules():
        if isinstance(module, (torch.nn.RMSNorm, DMCCoreAttention)):
            setattr(module, "forward", _fused(module.forward))  # noqa: B010 (a method, to a type checker)
        elif isinstance(module, Float16Module):
            module.register_forward_hook(_widened, with_kwargs=True)


def _widened(module: Any, inputs: Any, options: dict[str, Any], output: Tensor) -> Tensor:
    # Float16Module itself asks for a tensor's type, by names that the meta device has not.
    return output.float() if module.module.post_process and options.get("fp32_output", True) else output


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


def _rms_norm(x: Tensor, shape: Any, weight: Tensor, eps: float) -> Tensor:
    return _RMSNorm.apply(x, weight, eps)


class _RMSNorm(torch.autograd.Function):
    """Keeps what the CUDA kernel keeps, its input and one number per token. (aten's own has no other kernel than that one.)

    The backward pass has the right sizes and nothing else.
    """

    @staticmethod
    def forward(ctx: Any, x: Tensor, weight: Tensor, eps: float) -> Tensor:
        norm = torch.linalg.vector_norm(x, dim=-1, keepdim=True, dtype=torch.float32)
        scale = torch.rsqrt(norm.square() / x.shape[-1] + eps)
        ctx.save_for_backward(x, weight, scale)
        return (x * scale.to(x.dtype)).mul_(weight)

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor | None, ...]:
        x, weight, _ = ctx.saved_tensors
        return torch.empty_like(x), torch.empty_like(weight) if ctx.needs_input_grad[1] else None, None


def _attention(
    query: Tensor, key: Tensor, value: Tensor, *, is_causal: bool, scale: float | None, enable_gqa: bool
) -> Tensor:
    return aten._scaled_dot_product_flash_attention_for_cpu(query, key, value, 0.0, is_causal, scale=scale)[0]
