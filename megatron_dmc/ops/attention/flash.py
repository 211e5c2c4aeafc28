"""Attention on torch's stock flash kernels, with an additive bias per key, forward and backward.

The kernels give no gradient of a bias. A channel of the query that is one (after scaling) sums the rows of dS into the
same channel of the key's gradient: that is the bias' gradient. The channel is one that the caller left free, or one that
is added for the occasion.
"""

from dataclasses import replace
from typing import Any

from torch import Tensor

from megatron_dmc.ops.attention.documents import by_documents
from megatron_dmc.ops.attention.flash_cpu import cpu_backward, cpu_forward
from megatron_dmc.ops.attention.flash_cpu_window import cpu_window_backward, cpu_window_forward
from megatron_dmc.ops.attention.flash_cuda import cuda_backward, cuda_forward
from megatron_dmc.ops.attention.types import Attended, BiasedKeys, Gradients, KernelSettings

# The bias of a key that no query sees. exp(-1e4) is 0 in every dtype, and -1e4 itself is exact enough in bf16 and fp16. An
# infinite bias would leave a row without keys.
HIDDEN = -1e4


def flash_forward(query: Tensor, keys: BiasedKeys, settings: KernelSettings) -> Attended:
    """softmax(scale q . k + bias) v on a stock flash kernel: no s x s tensor, K and V never expanded to the query heads.

    Args:
        query: [batch, seq_q, heads, head_dim]; bf16 or fp16 on a GPU, any floating dtype on a CPU.
        keys: kv_heads divides heads. On a CPU a window takes no bias.

    Raises:
        TypeError: float32 on a GPU, for which there is no flash kernel.
    """
    settings = _without_idle_window(query, settings)
    if query.is_cuda:
        return cuda_forward(query, keys, settings)
    if settings.documents is not None:
        alone = replace(settings, documents=None)

        def rows(_: Tensor, query: Tensor, *keys: Any) -> Attended:
            return flash_forward(query, BiasedKeys(*keys), alone)

        return Attended(*by_documents(settings.documents, rows, query, *keys))
    if settings.window is not None:
        return cpu_window_forward(query, keys, settings)
    return cpu_forward(query, keys, settings)


def flash_backward(
    grad_out: Tensor, query: Tensor, keys: BiasedKeys, final: Attended, settings: KernelSettings
) -> Gradients:
    """This part's gradients. ``final`` may include terms which this kernel never saw.

    Only P_ij = exp(s_ij - lse_i) and rowsum(grad_out . out) enter, so with the final out and lse of a joined softmax the
    result is this part's exact share (as in ring attention, Liu et al., arXiv 2310.01889).
    """
    settings = _without_idle_window(query, settings)
    if query.is_cuda:
        return cuda_backward(grad_out, query, keys, final, settings)
    if settings.documents is not None:
        alone = replace(settings, documents=None)

        def rows(inside: Tensor, grad_out: Tensor, query: Tensor, out: Tensor, lse: Tensor, *keys: Any) -> Gradients:
            # Padding gets and gives no gradient.
            grad_out = grad_out.masked_fill(~inside[..., None, None], 0)
            lse = lse.masked_fill(~inside[..., None], float("inf"))
            return flash_backward(grad_out, query, BiasedKeys(*keys), Attended(out, lse), alone)

        return Gradients(*by_documents(settings.documents, rows, grad_out, query, *final, *keys))
    if settings.window is not None:
        return cpu_window_backward(grad_out, query, keys, final, settings)
    return cpu_backward(grad_out, query, keys, final, settings)


def _without_idle_window(query: Tensor, settings: KernelSettings) -> KernelSettings:
    """A window as long as the sequence hides nothing."""
    if settings.window is None or settings.window < query.shape[1]:
        return settings
    return replace(settings, window=None)
