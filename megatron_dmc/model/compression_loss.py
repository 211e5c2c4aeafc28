"""The one-sided compression loss: its gradient, its gate and the counts that the gate reads.

L = lambda max(0, (1 - 1/CR*) - mean alpha), the mean over all layers, KV heads, positions and samples of a global batch
(paper, section 3.2, where the hinge is taken per sample). The hinge's gradient is a constant times one bit: whether the
mean lies below the target. The bit is taken from the last global batch (the target moves by about 1/6000 a step). That
costs one small all-reduce per step and no message inside a step, and it is the same in every parallel layout.
"""

from typing import Any

import torch
from torch import Tensor

# Logits.
CLOSE = 0.5


class DecisionStatistics:
    """Of one layer since the last reset.

    Attributes:
        counts: int64 [4, kv_heads]: tokens merged with noise, merged without it, all, and those whose decision is close (see
            count_decisions); None: nothing was counted.
        slopes: float64 [2], see OffsetSlopes; None: not asked for.
    """

    def __init__(self) -> None:
        self.counts: Tensor | None = None
        self.slopes: Tensor | None = None

    def add(self, counts: Tensor) -> None:
        self.counts = counts.clone() if self.counts is None else self.counts + counts

    def add_slopes(self, slopes: Tensor) -> None:
        self.slopes = slopes if self.slopes is None else self.slopes + slopes

    def total(self) -> Tensor:
        """The counts; raises RuntimeError if nothing was counted."""
        if self.counts is None:
            raise RuntimeError("no decisions were counted since the last reset")
        return self.counts

    def reset(self) -> None:
        self.counts = self.slopes = None


def takes_effect(positions: Tensor, remaining: Tensor, local_window: int) -> Tensor:
    """bool: whether a token's decision takes effect within its text. The first token never merges, the last
    ``local_window`` tokens stay raw.

    Args:
        positions: the tokens' places in their texts.
        remaining: how many tokens of the text come after each.
    """
    return (positions > 0) & (remaining >= local_window)


def count_decisions(
    merge_logits: Tensor, decision_logits: Tensor, in_effect: Tensor, samples: Tensor | None = None
) -> Tensor:
    """Counts for DecisionStatistics: int64 [4, kv_heads].

    All tokens count. One whose decision takes no effect has a slot of its own. A decision is close if half a logit more or
    less would change it: their number says how fast the ratio changes with an offset.

    Args:
        merge_logits: with noise, [batch, seq, kv_heads].
        decision_logits: without noise, of the same shape.
        in_effect: bool [batch or 1, seq], see takes_effect.
        samples: bool [batch], whose tokens count; None: all samples'.
    """
    tokens = torch.full_like(merge_logits[0, 0], merge_logits[..., 0].numel(), dtype=torch.int64)
    if samples is not None:
        tokens = tokens // len(samples) * samples.sum()
        in_effect = in_effect & samples[:, None]
    noisy, noise_free = (((x > 0) & in_effect[..., None]).sum(dim=(0, 1)) for x in (merge_logits, decision_logits))
    close = ((decision_logits.abs() < CLOSE) & in_effect[..., None]).sum(dim=(0, 1))
    return torch.stack([noisy, noise_free, tokens, close])


class CompressionLoss(torch.autograd.Function):
    """Identity on ``value``. Its backward pass adds the loss' gradient to every alpha and the counts to the statistics.

    The backward pass of a micro-batch runs exactly once, with or without recomputation; its forward pass may run twice.
    The gradient is straight-through: the relaxed alpha gets what the counted, hard one would get.
    """

    @staticmethod
    def forward(
        ctx: Any, value: Tensor, alpha: Tensor, counts: Tensor, statistics: DecisionStatistics, alpha_gradient: float
    ) -> Tensor:
        ctx.counts, ctx.statistics, ctx.alpha_gradient = counts, statistics, alpha_gradient
        ctx.alpha = alpha.shape, alpha.dtype, alpha.device
        return value.view_as(value)

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor | None, ...]:
        ctx.statistics.add(ctx.counts)
        shape, dtype, device = ctx.alpha
        grad_alpha = torch.full((), ctx.alpha_gradient, dtype=dtype, device=device).expand(shape)
        return grads[0], grad_alpha, None, None, None


class OffsetSlopes(torch.autograd.Function):
    """Identity on the noisy logits. Its backward pass adds two derivatives by an offset of all decision logits to the
    statistics: the loss', as it is summed over tokens, and that of the number of merged tokens. Both are times the
    relaxation's temperature."""

    @staticmethod
    def forward(ctx: Any, merge_logits: Tensor, in_effect: Tensor, statistics: DecisionStatistics) -> Tensor:
        alpha = torch.sigmoid(merge_logits).masked_fill(~in_effect[..., None], 0)
        ctx.merges, ctx.statistics = (alpha * (1 - alpha)).sum(dtype=torch.float64), statistics
        return merge_logits.view_as(merge_logits)

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor | None, ...]:
        ctx.statistics.add_slopes(torch.stack([grads[0].sum(dtype=torch.float64), ctx.merges]))
        return grads[0], None, None


def merge_fraction_target(compression_ratio: float) -> float:
    """1 - 1/CR: the fraction of tokens that must merge."""
    return 1 - 1 / compression_ratio


def compression_ratio(merged: Tensor | float, tokens: Tensor | float) -> Any:
    """tokens / slots = 1 / (1 - mean alpha)."""
    return tokens / (tokens - merged)
