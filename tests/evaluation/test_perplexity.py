"""Held-out loss of packed documents, and the ratio reached there, against every document evaluated alone."""

import itertools
from typing import Any

import numpy
import pytest
import torch

from megatron_dmc.config import DMCConfig
from megatron_dmc.data import HeldoutWindows
from megatron_dmc.data.repeats import text_twice
from megatron_dmc.evaluation.perplexity import evaluate, measure_recall
from megatron_dmc.inference.loading import LoadedModel
from megatron_dmc.model.gpt import dmc_layers
from tests.support.models import positions, random_model, tokens

pytestmark = pytest.mark.usefixtures("one_process")

LENGTH, WINDOWS = 40, 5
# Documents' first tokens in the stream: documents of one token, one that begins a window and one that ends with it, one
# longer than a window, and two that a window cuts.
STARTS = [0, 1, 9, 10, 11, 30, 80, 119, 120, 133, 185, 199, 200]
STREAM = tokens(1, WINDOWS * LENGTH + 1)[0]

VARIANTS = {
    "base": None,
    "projection": DMCConfig(decision_bias=0.5),
    "neuron": DMCConfig(decision_source="neuron", decision_bias=0.5),
    "DMC-C": DMCConfig(per_layer=True, decision_bias=0.5),
    "truncated": DMCConfig(window_size=4, decision_bias=0.5),
    "merge-local5": DMCConfig(local_window=5, decision_bias=0.5),
    "evict-local5": DMCConfig(operation="evict", local_window=5, decision_bias=0.5),
    "absorb-local5": DMCConfig(operation="absorb", local_window=5, decision_bias=0.5),
}


def loaded_model(dmc: DMCConfig | None) -> LoadedModel:
    """In float64. What an evaluation does not read is None."""
    unread: Any = None
    return LoadedModel(random_model(dmc).double(), unread, unread, merges=dmc is not None)


def alone(loaded: LoadedModel, begin: int, end: int) -> tuple[float, int, torch.Tensor | None]:
    """Loss and number of its tokens of the stream's tokens from begin to end, as a text; merged decisions [layers, kv_heads].

    The next token counts where it belongs to the same document.
    """
    layers = dmc_layers(loaded.model)
    for layer in layers:
        layer.statistics.reset()
    ids = STREAM[begin : end + 1][None]
    with torch.no_grad():
        losses = loaded.model(ids[:, :-1], positions(ids[:, :-1]), None, labels=ids[:, 1:])[0]
    losses = losses[: len(losses) - (end in STARTS)]
    merged = torch.stack([layer.statistics.total()[1] for layer in layers]) if loaded.merges else None
    return float(losses.double().sum()), len(losses), merged


@pytest.mark.parametrize("variant", VARIANTS)
def test_packed_documents_equal_each_alone(variant: str) -> None:
    loaded = loaded_model(VARIANTS[variant])
    starts = numpy.array(STARTS)
    result = evaluate(loaded, HeldoutWindows(STREAM.numpy(), LENGTH, 2.0, starts=starts), batch_size=2)

    cuts = sorted({*STARTS, *range(0, WINDOWS * LENGTH + 1, LENGTH)})
    parts = [alone(loaded, begin, end) for begin, end in itertools.pairwise(cuts)]
    counted = sum(part[1] for part in parts)
    assert result.tokens == counted == WINDOWS * LENGTH - (len(STARTS) - 1)
    expected = sum(part[0] for part in parts) / counted
    assert result.loss == pytest.approx(expected, rel=1e-6)
    assert result.loss_per_byte == pytest.approx(expected / 2, rel=1e-6)
    if not loaded.merges:
        assert result.layer_head_ratio is result.compression_ratio is None
        return
    merged = sum(part[2] for part in parts).double()
    assert 0.1 < merged.mean() / (WINDOWS * LENGTH) < 0.9, "decisions are not mixed"
    expected_ratio = WINDOWS * LENGTH / (WINDOWS * LENGTH - merged)
    torch.testing.assert_close(result.layer_head_ratio, expected_ratio, rtol=1e-12, atol=0)
    assert result.compression_ratio == pytest.approx(1 / float((1 / expected_ratio).mean()), rel=1e-12)


@pytest.mark.parametrize("variant", VARIANTS)
def test_recall_of_packed_documents_equals_each_alone(variant: str) -> None:
    """Documents of one token have nothing to copy, and a cut one as much as is there."""
    loaded = loaded_model(VARIANTS[variant])
    windows = HeldoutWindows(STREAM.numpy(), LENGTH, 2.0, starts=numpy.array(STARTS))
    total, tokens = 0.0, 0
    for i in range(4):
        sample, second = text_twice(windows[i])
        begins = [*sample["document_starts"].nonzero().flatten().tolist(), LENGTH]
        for begin, end in itertools.pairwise(begins):
            ids, labels = sample["tokens"][None, begin:end], sample["labels"][None, begin:end]
            with torch.no_grad():
                losses = loaded.model(ids, positions(ids), None, labels=labels)[0]
            total, tokens = total + float(losses[second[begin:end]].sum()), tokens + int(second[begin:end].sum())
    assert 40 < tokens < 4 * 20
    assert measure_recall(loaded, windows, batch_size=3, limit=4) == pytest.approx(total / tokens, rel=1e-6)


def test_recall_where_nothing_counts() -> None:
    loaded = loaded_model(None)
    windows = HeldoutWindows(STREAM.numpy(), LENGTH, 2.0, trained=numpy.zeros(len(STREAM)))
    assert measure_recall(loaded, windows) is None
