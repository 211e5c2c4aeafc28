"""The injected gradient of the compression loss against autograd through the loss as it is written."""

from typing import Any

import pytest
import torch
from torch import Tensor

from megatron_dmc.config import DMCConfig
from megatron_dmc.model import attention
from megatron_dmc.model.attention import StepContext
from megatron_dmc.model.compression_loss import CompressionLoss, count_decisions, merge_fraction_target, takes_effect
from megatron_dmc.model.gpt import dmc_layers
from tests.support.models import SIZES, positions, random_model, tokens

pytestmark = pytest.mark.usefixtures("one_process")

COEFFICIENT, TARGET = 3.0, 4.0
BATCH, SEQ = 3, 33


def gradients(dmc: DMCConfig, alpha_gradient: float, alphas: list[Tensor] | None = None) -> dict[str, Tensor]:
    """Parameter gradients of the LM loss, plus the injected ones or those of the hinge over ``alphas``."""
    model, ids = random_model(dmc).train(), tokens(BATCH, SEQ + 1)
    for layer in dmc_layers(model):
        layer.step = StepContext(alpha_gradient=alpha_gradient)
    loss = model(ids[:, :-1], positions(ids[:, :-1]), torch.arange(BATCH) + 7, labels=ids[:, 1:]).mean()
    if alphas is not None:
        hard = [(alpha > 0.5).to(alpha.dtype) + alpha - alpha.detach() for alpha in alphas]
        count = SIZES.num_layers * SIZES.num_query_groups * BATCH * SEQ
        mean = sum(alpha.sum() for alpha in hard) / count
        loss = loss + COEFFICIENT * torch.clamp(merge_fraction_target(TARGET) - mean, min=0)
    loss.backward()
    return {name: parameter.grad for name, parameter in model.named_parameters() if parameter.grad is not None}


def collected_alphas(monkeypatch: pytest.MonkeyPatch) -> list[Tensor]:
    """From now on every layer's counted alphas are put here, and no gradient is injected."""
    alphas: list[Tensor] = []

    class Collect(CompressionLoss):
        @staticmethod
        def apply(value: Tensor, alpha: Tensor, *_: Any) -> Tensor:  # type: ignore[override]
            alphas.append(alpha)
            return value

    monkeypatch.setattr(attention, "CompressionLoss", Collect)
    return alphas


@pytest.mark.parametrize("per_layer", [False, True], ids=["per_head", "per_layer"])
@pytest.mark.parametrize("source", ["projection", "neuron"])
def test_injected_gradient_is_the_hinges(source: Any, per_layer: bool, monkeypatch: pytest.MonkeyPatch) -> None:
    dmc = DMCConfig(decision_source=source, per_layer=per_layer, decision_bias=2.0)
    count = SIZES.num_layers * SIZES.num_query_groups * BATCH * SEQ
    injected = gradients(dmc, -COEFFICIENT / count)

    alphas = collected_alphas(monkeypatch)
    written = gradients(dmc, 0.0, alphas)
    assert len(alphas) == SIZES.num_layers
    without = gradients(dmc, 0.0)
    assert injected.keys() == written.keys()
    for name, gradient in injected.items():
        torch.testing.assert_close(gradient, written[name], rtol=2e-5, atol=2e-6 * float(written[name].abs().max()))
    moved = [name for name in injected if not torch.allclose(injected[name], without[name])]
    assert any(".decision." in name if source == "projection" else "linear_qkv" in name for name in moved)


def test_samples_that_are_not_counted_are_nowhere() -> None:
    merge = torch.tensor([[[1.0], [1.0], [-1.0]], [[1.0], [1.0], [1.0]]])
    places = torch.arange(3)[None]
    in_effect = takes_effect(places, 2 - places, 0)
    counts = count_decisions(merge, merge, in_effect, torch.tensor([True, False]))
    assert counts.tolist() == count_decisions(merge[:1], merge[:1], in_effect).tolist() == [[1], [1], [3], [0]]
    assert not count_decisions(merge, merge, in_effect, torch.tensor([False, False])).any()


def test_counts_leave_the_first_token_out() -> None:
    merge = torch.tensor([[[1.0, 1.0], [1.0, -1.0], [2.0, -2.0]]])
    noise_free = torch.tensor([[[0.1, 1.0], [-1.0, 0.4], [-2.0, -0.4]]])
    places = torch.arange(3)[None]
    counts = count_decisions(merge, noise_free, takes_effect(places, 2 - places, 0))
    assert counts.tolist() == [[2, 0], [0, 1], [3, 3], [0, 2]]
    counts = count_decisions(merge, noise_free, takes_effect(places, 2 - places, 1))
    assert counts.tolist() == [[1, 0], [0, 1], [3, 3], [0, 1]]


@pytest.mark.parametrize("per_layer", [False, True], ids=["per_head", "per_layer"])
@pytest.mark.parametrize("operation", ["merge", "absorb"])
def test_slopes_of_an_offset_are_autograds(operation: Any, per_layer: bool, monkeypatch: pytest.MonkeyPatch) -> None:
    dmc = DMCConfig(
        decision_source="projection", operation=operation, local_window=5, per_layer=per_layer, ratio_control="offset"
    )
    model, ids, alphas = random_model(dmc).train(), tokens(BATCH, SEQ + 1), collected_alphas(monkeypatch)
    offsets = [torch.zeros(1, requires_grad=True) for _ in dmc_layers(model)]
    for layer, offset in zip(dmc_layers(model), offsets, strict=True):
        layer.decision.offset = offset
    loss = model(ids[:, :-1], positions(ids[:, :-1]), torch.arange(BATCH) + 7, labels=ids[:, 1:]).sum()
    merges = [
        torch.autograd.grad(alpha.sum(), offset, retain_graph=True)[0]
        for alpha, offset in zip(alphas, offsets, strict=True)
    ]
    for layer in dmc_layers(model):
        layer.statistics.reset()
    for layer, merged, by_loss in zip(dmc_layers(model), merges, torch.autograd.grad(loss, offsets), strict=True):
        expected = torch.cat([by_loss, merged]).double() * dmc.temperature
        torch.testing.assert_close(layer.statistics.slopes, expected, rtol=1e-4, atol=1e-5)
        assert (expected.abs() > 1e-5).all()
