"""KL divergence between the next-token distributions of a teacher and a student, on vocabulary-parallel logits."""

from typing import Any, Literal

import torch
import torch.distributed as dist
from torch import Tensor


def distillation_loss(
    student_logits: Tensor,
    teacher_logits: Tensor,
    *,
    direction: Literal["forward", "reverse"] = "forward",
    temperature: float = 1.0,
    top_k: int | None = None,
    group: dist.ProcessGroup | None = None,
) -> Tensor:
    """tau^2 KL at temperature tau, per token (Hinton et al., arXiv 1503.02531).

    forward is KL(teacher || student): the student covers what the teacher finds likely. reverse is KL(student || teacher).
    Full logits are never gathered: each rank sums over its part of the vocabulary.

    Args:
        student_logits: [..., vocabulary / ranks], any floating dtype; computed in float32 or wider.
        teacher_logits: as student_logits; gets no gradient.
        temperature: tau, > 0, divides the logits.
        top_k: compare only the teacher's k likeliest tokens (and those as likely as the kth), both distributions
            normalized over them. None: the whole vocabulary.
        group: the ranks that share the vocabulary; None: this process holds all of it.

    Returns:
        [...] in float32 or wider; differentiable in student_logits.
    """
    if top_k is not None:
        below = teacher_logits < _kth_largest(teacher_logits, top_k, group)
        student_logits = student_logits.masked_fill(below, float("-inf"))
        teacher_logits = teacher_logits.masked_fill(below, float("-inf"))
    return _KLDivergence.apply(student_logits, teacher_logits, direction, temperature, group)


def _kth_largest(logits: Tensor, k: int, group: dist.ProcessGroup | None) -> Tensor:
    """[..., 1]: the kth largest logit of the whole vocabulary (the smallest one if there are fewer)."""
    own = logits.topk(min(k, logits.shape[-1]), dim=-1).values
    if _ranks(group) > 1:
        parts = [torch.empty_like(own) for _ in range(_ranks(group))]
        dist.all_gather(parts, own.contiguous(), group=group)
        own = torch.cat(parts, dim=-1)
    return own.topk(min(k, own.shape[-1]), dim=-1).values[..., -1:]


class _KLDivergence(torch.autograd.Function):
    @staticmethod
    def forward(
        ctx: Any,
        student_logits: Tensor,
        teacher_logits: Tensor,
        direction: str,
        temperature: float,
        group: dist.ProcessGroup | None,
    ) -> Tensor:
        student = _log_softmax(student_logits, temperature, group)
        teacher = _log_softmax(teacher_logits, temperature, group)
        first, second = (teacher, student) if direction == "forward" else (student, teacher)
        # A token outside the top k has probability 0 in both: 0 log 0 = 0.
        ratio = (first - second).masked_fill_(first == float("-inf"), 0)
        divergence = _sum((first.exp() * ratio).sum(-1), group)
        # d KL / d logits: p_s - p_t, and for reverse p_s (log p_s - log p_t - KL); times tau^2 / tau.
        if direction == "forward":
            gradient = student.exp() - teacher.exp()
        else:
            gradient = student.exp() * (ratio - divergence[..., None])
        ctx.save_for_backward((temperature * gradient).to(student_logits.dtype))
        return temperature**2 * divergence

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor | None, ...]:
        (gradient,) = ctx.saved_tensors
        return gradient * grads[0][..., None].to(gradient.dtype), None, None, None, None


def _log_softmax(logits: Tensor, temperature: float, group: dist.ProcessGroup | None) -> Tensor:
    logits = logits.to(torch.promote_types(logits.dtype, torch.float32)) / temperature
    peak = logits.amax(-1, keepdim=True)
    if _ranks(group) > 1:
        dist.all_reduce(peak, op=dist.ReduceOp.MAX, group=group)
    logits = logits - peak
    return logits - _sum(logits.exp().sum(-1, keepdim=True), group).log()


def _sum(x: Tensor, group: dist.ProcessGroup | None) -> Tensor:
    if _ranks(group) > 1:
        dist.all_reduce(x, group=group)
    return x


def _ranks(group: dist.ProcessGroup | None) -> int:
    return 1 if group is None else dist.get_world_size(group)
