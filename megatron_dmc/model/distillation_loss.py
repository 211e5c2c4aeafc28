"""KL divergence between the next-token distributions of a teacher and a student, on vocabulary-parallel logits."""

from collections.abc import Callable, Iterator
from functools import partial
from typing import Any, Literal

import torch
import torch.distributed as dist
from torch import Tensor

# Of one temporary tensor of the loss, in float32: on a CPU it stays in the cache, on a GPU it keeps the chip busy.
CPU_CHUNK_BYTES, CHUNK_BYTES = 2**22, 2**28


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
    of_tokens = partial(_divergence, direction=direction, temperature=temperature, top_k=top_k, group=group)
    divergence = _KLDivergence.apply(student_logits.flatten(0, -2), teacher_logits.flatten(0, -2), of_tokens)
    return divergence.view(student_logits.shape[:-1])


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
        of_tokens: Callable[[Tensor, Tensor], tuple[Tensor, Tensor]],
    ) -> Tensor:
        gradient, divergences = torch.empty_like(student_logits), []
        for student, teacher, into in _chunks(student_logits, teacher_logits, gradient):
            divergence, slope = of_tokens(student, teacher)
            divergences.append(divergence)
            into.copy_(slope)
        ctx.save_for_backward(gradient)
        return torch.cat(divergences)

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor | None, ...]:
        (gradient,) = ctx.saved_tensors
        scaled = torch.empty_like(gradient)
        for slope, grad, into in _chunks(gradient, grads[0][:, None], scaled):
            torch.mul(slope.to(grad.dtype), grad, out=into)
        return scaled, None, None


def _chunks(logits: Tensor, *others: Tensor) -> Iterator[tuple[Tensor, ...]]:
    """Some tokens at a time of tensors [tokens, ...]."""
    size = CPU_CHUNK_BYTES if logits.device.type == "cpu" else CHUNK_BYTES
    tokens = max(1, size // (4 * logits.shape[-1]))
    return zip(*(x.split(tokens) for x in (logits, *others)), strict=True)


def _divergence(
    student_logits: Tensor,
    teacher_logits: Tensor,
    *,
    direction: str,
    temperature: float,
    top_k: int | None,
    group: dist.ProcessGroup | None,
) -> tuple[Tensor, Tensor]:
    """tau^2 KL of some tokens, and its derivative by the student's logits; float32 or wider."""
    if top_k is not None:
        below = teacher_logits < _kth_largest(teacher_logits, top_k, group)
        student_logits = student_logits.masked_fill(below, float("-inf"))
        teacher_logits = teacher_logits.masked_fill(below, float("-inf"))
    student = _log_softmax(student_logits, temperature, group)
    teacher = _log_softmax(teacher_logits, temperature, group)
    first, second = (teacher, student) if direction == "forward" else (student, teacher)
    ratio = first - second
    if top_k is not None:
        # A token outside the top k has probability 0 in both: 0 log 0 = 0.
        ratio.masked_fill_(below, 0)
    divergence = _sum((first.exp() * ratio).sum(-1), group)
    student.exp_()
    slope = student - teacher.exp_() if direction == "forward" else student * (ratio - divergence[..., None])
    # tau^2 / tau.
    return temperature**2 * divergence, slope.mul_(temperature)


def _log_softmax(logits: Tensor, temperature: float, group: dist.ProcessGroup | None) -> Tensor:
    logits = logits.to(torch.promote_types(logits.dtype, torch.float32)) / temperature
    if _ranks(group) == 1:
        return logits.log_softmax(-1)
    peak = logits.amax(-1, keepdim=True)
    dist.all_reduce(peak, op=dist.ReduceOp.MAX, group=group)
    logits = logits - peak
    return logits - _sum(logits.exp().sum(-1, keepdim=True), group).log()


def _sum(x: Tensor, group: dist.ProcessGroup | None) -> Tensor:
    if _ranks(group) > 1:
        dist.all_reduce(x, group=group)
    return x


def _ranks(group: dist.ProcessGroup | None) -> int:
    return 1 if group is None else dist.get_world_size(group)
