"""torch's flash kernel for a CPU. It takes a mask that broadcasts over the queries: a bias per key stays that small."""

import torch
import torch.nn.functional as F
from torch import Tensor

from megatron_dmc.ops.attention.bias_channel import split_bias, with_channel
from megatron_dmc.ops.attention.types import Attended, BiasedKeys, Gradients, KernelSettings

aten = torch.ops.aten

KNOWS_GROUPS = torch.torch_version.TorchVersion(torch.__version__) >= "2.9"


def cpu_forward(query: Tensor, keys: BiasedKeys, settings: KernelSettings) -> Attended:
    """flash_forward without documents and without a window."""
    tensors = _heads_first(query, keys.key, keys.value)
    out, lse = kernel_forward(
        *tensors, causal=settings.causal, mask=_mask(query, keys.bias), softmax_scale=settings.softmax_scale
    )
    return Attended(out.transpose(1, 2), lse.transpose(1, 2))


def cpu_backward(
    grad_out: Tensor, query: Tensor, keys: BiasedKeys, final: Attended, settings: KernelSettings
) -> Gradients:
    """flash_backward without documents and without a window."""
    head_dim, in_query = query.shape[-1], 1 / settings.softmax_scale
    key, value, bias = keys
    if bias is None:
        wide, channel = (grad_out, query, key, value, final.out), None
    elif settings.bias_channel is not None:
        channel = settings.bias_channel % head_dim
        wide = (grad_out, with_channel(query, channel, in_query), key, value, final.out)
    else:
        channel = head_dim
        padded_query = F.pad(query, (0, 1), value=in_query)
        wide = (
            F.pad(grad_out, (0, 1)),
            padded_query,
            F.pad(key, (0, 1)),
            F.pad(value, (0, 1)),
            F.pad(final.out, (0, 1)),
        )
    wide_grad, wide_query, wide_key, wide_value, wide_out = _heads_first(*wide)
    grads = kernel_backward(
        wide_grad,
        wide_query,
        wide_key,
        wide_value,
        wide_out,
        final.lse.transpose(1, 2).contiguous(),
        causal=settings.causal,
        mask=_mask(query, bias),
        softmax_scale=settings.softmax_scale,
    )
    return split_bias([g.transpose(1, 2) for g in grads], channel, head_dim, 1.0)


def _heads_first(*tensors: Tensor) -> list[Tensor]:
    return [x.transpose(1, 2) for x in tensors]


def _mask(query: Tensor, bias: Tensor | None) -> Tensor | None:
    """[batch, heads, 1, seq_k]: the kernel broadcasts it over the queries, without memory if the keys lie together."""
    if bias is None:
        return None
    group = query.shape[2] // bias.shape[2]
    bias = bias.to(torch.promote_types(query.dtype, torch.float32))
    return bias.repeat_interleave(group, dim=2).transpose(1, 2)[:, :, None].contiguous()


def kernel_forward(
    query: Tensor, key: Tensor, value: Tensor, *, causal: bool, mask: Tensor | None, softmax_scale: float
) -> tuple[Tensor, Tensor]:
    """torch's kernel: query [batch, heads, seq_q, d], key and value [batch, kv_heads, seq_k, d] -> out, lse."""
    key, value = (_for_each_query_head(x, query) for x in (key, value))
    return aten._scaled_dot_product_flash_attention_for_cpu(
        query, key, value, 0.0, causal, attn_mask=mask, scale=softmax_scale
    )


def kernel_backward(
    grad_out: Tensor,
    query: Tensor,
    key: Tensor,
    value: Tensor,
    out: Tensor,
    lse: Tensor,
    *,
    causal: bool,
    mask: Tensor | None,
    softmax_scale: float,
) -> list[Tensor]:
    """The gradients of kernel_forward's query, key and value."""
    kv_heads = key.shape[1]
    wide_key, wide_value = (_for_each_query_head(x, query) for x in (key, value))
    d_query, d_key, d_value = aten._scaled_dot_product_flash_attention_for_cpu_backward(
        grad_out, query, wide_key, wide_value, out, lse, 0.0, causal, attn_mask=mask, scale=softmax_scale
    )
    if wide_key is not key:
        d_key, d_value = (x.unflatten(1, (kv_heads, -1)).sum(2) for x in (d_key, d_value))
    return [d_query, d_key, d_value]


def _for_each_query_head(x: Tensor, query: Tensor) -> Tensor:
    """A key or value as the kernel takes it. Before torch 2.9 it knows no groups of query heads, and reads beyond the end."""
    group = query.shape[1] // x.shape[1]
    return x if group == 1 or KNOWS_GROUPS else x.repeat_interleave(group, dim=1)
