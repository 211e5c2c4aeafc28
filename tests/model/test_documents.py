"""Packed documents: a model computes for each document what it computes for that document alone."""

from typing import Any

import pytest
import torch
from megatron.core.packed_seq_params import PackedSeqParams
from torch import Tensor

from megatron_dmc.config import DMCConfig
from megatron_dmc.model import attention
from megatron_dmc.model.attention import StepContext
from megatron_dmc.model.documents import pack_documents
from megatron_dmc.model.gpt import dmc_layers
from megatron_dmc.recipe import DistillationConfig
from megatron_dmc.training.forward_step import DistillationStep, forward_step
from tests.support.models import positions, random_model, tokens

pytestmark = pytest.mark.usefixtures("one_process")

BATCH, SEQ = 2, 41
# First tokens of the documents of each row.
ROWS = ([0, 1, 17], [0, 30])
SELECTIVE = {"recompute_granularity": "selective", "recompute_modules": ["core_attn"]}
FULL = {"recompute_granularity": "full", "recompute_method": "uniform", "recompute_num_layers": 1}
VARIANTS: dict[str, tuple[DMCConfig | None, dict[str, Any]]] = {
    "base": (None, {}),
    "projection": (DMCConfig(decision_bias=0.5), SELECTIVE),
    "neuron": (DMCConfig(decision_source="neuron", decision_bias=0.5), FULL),
    "merge-local5": (DMCConfig(local_window=5, decision_bias=0.5), FULL),
    "evict-local5": (DMCConfig(operation="evict", local_window=5, decision_bias=0.5), {}),
    "absorb-local5": (DMCConfig(operation="absorb", local_window=5, decision_bias=0.5), SELECTIVE),
    "truncated": (DMCConfig(window_size=4, decision_bias=0.5), {}),
}


def starts() -> Tensor:
    marks = torch.zeros(BATCH, SEQ, dtype=torch.bool)
    for row, places in enumerate(ROWS):
        marks[row, places] = True
    return marks


def documents() -> list[tuple[int, slice]]:
    """Row and place of each."""
    return [
        (row, slice(begin, end))
        for row, places in enumerate(ROWS)
        for begin, end in zip(places, [*places[1:], SEQ], strict=True)
    ]


class Runs:
    """A model's losses, parameter gradients and decision counts, over one or several calls."""

    def __init__(self, dmc: DMCConfig | None, training: bool, config: dict[str, Any]) -> None:
        self.model = random_model(dmc, **config).double().train(training)
        for layer in dmc_layers(self.model):
            layer.step = StepContext(merging=dmc is not None, alpha_gradient=-0.01 if training else 0.0)

    def call(
        self, inputs: Tensor, labels: Tensor, first: Tensor, weights: Tensor, packed: PackedSeqParams | None
    ) -> Tensor:
        """``first``: what the noise of the first token is keyed by."""
        losses = self.model(inputs, positions(inputs), first, labels=labels, packed_seq_params=packed)
        (losses * weights).sum().backward()
        return losses.detach()

    def results(self) -> list[Tensor]:
        counts = [layer.statistics.counts for layer in dmc_layers(self.model) if layer.statistics.counts is not None]
        gradients = [p.grad for p in self.model.parameters() if p.grad is not None]
        return [*gradients, *(x.double() for x in counts)]


@pytest.mark.parametrize("form", ["starts", "bshd", "thd"])
@pytest.mark.parametrize("training", [True, False], ids=["train", "eval"])
@pytest.mark.parametrize("variant", VARIANTS)
def test_packed_equals_each_document_alone(
    variant: str, training: bool, form: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    noise = torch.randn(8, BATCH * SEQ, 2, generator=torch.Generator().manual_seed(3))

    def given(seed: int, first: Tensor, layer: int, heads: range, places: Tensor) -> Tensor:
        return noise[layer, first[:, None] + places]

    monkeypatch.setattr(attention, "logistic_noise", given)
    dmc, config = VARIANTS[variant]
    inputs, labels = tokens(BATCH, SEQ + 1)[:, :-1], tokens(BATCH, SEQ + 1)[:, 1:]
    weights = torch.rand(BATCH, SEQ, generator=torch.Generator().manual_seed(4), dtype=torch.float64)

    packed, apart = Runs(dmc, training, config), Runs(dmc, training, config)
    losses = []
    for row, place in documents():
        own, first = slice(row, row + 1), torch.tensor([row * SEQ + place.start])
        losses.append(apart.call(inputs[own, place], labels[own, place], first, weights[own, place], None)[0])
    expected = torch.cat(losses).view(BATCH, SEQ)

    given_starts = starts()
    ends = torch.cat([given_starts.flatten().nonzero()[:, 0], torch.tensor([BATCH * SEQ])]).int()
    if form == "thd":
        longest = int(torch.diff(ends).max())
        params = PackedSeqParams("thd", ends, ends, max_seqlen_q=longest, max_seqlen_kv=longest)
        row = [x.reshape(1, -1) for x in (inputs, labels)]
        found = packed.call(*row, torch.tensor([0]), weights.view(1, -1), params).view(BATCH, SEQ)  # type: ignore[call-arg]
    else:
        params = pack_documents(given_starts)
        if form == "bshd":
            params = PackedSeqParams("bshd", ends, ends, max_seqlen_q=SEQ, max_seqlen_kv=SEQ)
        found = packed.call(inputs, labels, torch.arange(BATCH) * SEQ, weights, params)

    torch.testing.assert_close(found, expected, rtol=2e-5, atol=2e-5)
    results = zip(packed.results(), apart.results(), strict=True)
    for x, y in results:
        torch.testing.assert_close(x, y, rtol=1e-4, atol=2e-5 * float(y.abs().max()))


@pytest.mark.parametrize("distills", [False, True], ids=["alone", "taught"])
def test_forward_step_hands_documents_to_all_models(distills: bool) -> None:
    """The tokens of one document change no loss in another, neither the student's nor its teacher's."""
    dmc = DMCConfig(decision_bias=0.5)
    model, teacher = random_model(dmc), random_model(None, seed=1)
    step: Any = forward_step
    if distills:
        step = DistillationStep(DistillationConfig(weight=0.5), [model], [teacher])
    ids = tokens(BATCH, SEQ + 1)
    changed = ids.clone()
    changed[0, 3:10] = (changed[0, 3:10] + 1) % 97

    def loss(ids: Tensor, mask: Tensor) -> Tensor:
        inputs = ids[:, :-1]
        batch = {"tokens": inputs, "labels": ids[:, 1:], "position_ids": positions(inputs), "loss_mask": mask}
        batch |= {"sample_index": torch.arange(BATCH), "document_starts": starts()}
        output, loss_function = step(iter([batch]), model)
        return loss_function(output)[0]

    others = torch.ones(BATCH, SEQ)
    others[0, 1:17] = 0
    with torch.no_grad():
        torch.testing.assert_close(loss(changed, others), loss(ids, others), rtol=0, atol=0)
        assert loss(changed, 1 - others) != loss(ids, 1 - others)
