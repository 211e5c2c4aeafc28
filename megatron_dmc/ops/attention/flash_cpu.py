"""torch's flash kernel for a CPU. It takes a mask that broadcasts over the queries: a bias per key stays that small."""

import torch
import torch.nn.functional as F
from torch import Tensor

from megatron_dmc.ops.attention.bias_channel import split_bias, with_channel
from megatron_dmc.ops.attention.types import Attended, BiasedKeys, Gradients, KernelSettings

aten = torch.ops.aten


def cpu_forward(query: Tensor, keys: BiasedKeys, settings: KernelSettings) -> Attended:
    """flash_forward without documents and without a window."""
    out, lse = aten._scaled_dot_product_flash_attention_for_cpu(
        *_heads_first(query, keys.key, keys.value),
        0.0,
        settings.causal,
        attn_mask=_mask(query, keys.bias),
        scale=settings.softmax_scale,
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
    grads = aten._scaled_dot_product_flash_attention_for_cpu_backward(
        *_heads_first(*wide),
        final.lse.transpose(1, 2).contiguous(),
        0.0,
        settings.causal,
        attn_mask=_mask(query, bias),
        scale=settings.softmax_scale,
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
