"""The distillation loss against torch's own KL in float64, on one process and on a vocabulary split over two."""

from typing import Any

import pytest
import torch
import torch.distributed as dist
import torch.nn.functional as F
from torch import Tensor

from megatron_dmc.model import distillation_loss
from tests.support.processes import run_ranks

VOCABULARY = 26
CASES = [(direction, t, k) for direction in ("forward", "reverse") for t in (1.0, 2.5) for k in (None, 1, 7, 26, 99)]


def logits(dtype: torch.dtype = torch.float64) -> tuple[Tensor, Tensor]:
    generator = torch.Generator().manual_seed(0)
    return tuple((3 * torch.randn(5, 3, VOCABULARY, generator=generator, dtype=torch.float64)).to(dtype) for _ in "st")  # type: ignore[return-value]


def oracle(student: Tensor, teacher: Tensor, direction: str, temperature: float, top_k: int | None) -> Tensor:
    """tau^2 sum p (log p - log q), over the teacher's top k only."""
    if top_k is not None:
        kept = teacher.topk(min(top_k, VOCABULARY), dim=-1).indices
        student, teacher = student.gather(-1, kept), teacher.gather(-1, kept)
    p, q = ((x / temperature).log_softmax(-1) for x in (teacher, student))
    if direction == "reverse":
        p, q = q, p
    return temperature**2 * F.kl_div(q, p, reduction="none", log_target=True).sum(-1)


def check(
    direction: Any, temperature: float, top_k: int | None, group: Any = None, rank: int = 0, ranks: int = 1
) -> None:
    student, teacher = logits()
    weight = torch.arange(15.0, dtype=torch.float64).view(5, 3)
    whole = student.clone().requires_grad_()
    expected = oracle(whole, teacher, direction, temperature, top_k)
    (expected * weight).sum().backward()
    part = slice(rank * VOCABULARY // ranks, (rank + 1) * VOCABULARY // ranks)
    mine = student[..., part].clone().requires_grad_()
    loss = distillation_loss.distillation_loss(
        mine, teacher[..., part], direction=direction, temperature=temperature, top_k=top_k, group=group
    )
    (loss * weight).sum().backward()
    torch.testing.assert_close(loss, expected, rtol=1e-12, atol=1e-12)
    torch.testing.assert_close(mine.grad, whole.grad[..., part], rtol=1e-11, atol=1e-12)  # type: ignore[index]


@pytest.mark.parametrize("tokens", [1, 4, 15])
@pytest.mark.parametrize(("direction", "temperature", "top_k"), CASES)
def test_equals_the_oracle(
    direction: str, temperature: float, top_k: int | None, tokens: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    """In chunks of so many of the 15 tokens."""
    monkeypatch.setattr(distillation_loss, "CPU_CHUNK_BYTES", 4 * VOCABULARY * tokens)
    check(direction, temperature, top_k)


def test_equal_logits_have_no_loss_and_bf16_keeps_its_dtype() -> None:
    student, _ = logits(torch.bfloat16)
    student.requires_grad_()
    loss = distillation_loss.distillation_loss(student, student.detach())
    loss.sum().backward()
    assert loss.dtype == torch.float32 and not loss.any()
    assert student.grad is not None and student.grad.dtype == torch.bfloat16 and not student.grad.any()


def test_a_split_vocabulary_gives_the_same() -> None:
    for done in run_ranks(2, "-m", __name__):
        assert done.returncode == 0, done.stderr


if __name__ == "__main__":
    dist.init_process_group("gloo")
    for case in CASES:
        check(*case, group=dist.group.WORLD, rank=dist.get_rank(), ranks=2)
    dist.destroy_process_group()
