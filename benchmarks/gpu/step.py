"""A training step of a small model of megatron-core: its speed and host waits, and its numbers."""

import dataclasses
import functools
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import models
import torch
from torch import Tensor

from gpu.inputs import plain_attention
from gpu.measure import checked, host_waits, relative_error, time_rows
from gpu.run import Run
from gpu.sizes import DTYPE
from megatron_dmc.config import DMCConfig
from megatron_dmc.model.gpt import dmc_layers
from megatron_dmc.model.model_config import ModelConfig
from megatron_dmc.ops.attention import dmc_attention

LOSS_BOUND = 5e-3
# A step's gradient has gone through every layer twice: it is compared with the base model's own bf16 error.
GRADIENT_FACTOR = 2.0
SOURCES: dict[str, DMCConfig | None] = {"base": None, **models.DMC_SOURCES}


@contextmanager
def _process_group(run: Run) -> Iterator[tuple[ModelConfig, dict[str, Any]]]:
    """A group of this process alone while the block runs; the model's sizes and a batch."""
    models.initialize()
    try:
        sizes = dataclasses.replace(models.SIZES, num_layers=run.sizes.step_layers, hidden_size=run.sizes.step_hidden)
        yield sizes, models.arguments(sizes, 1, run.sizes.step_seq, run.device)
    finally:
        models.finalize()


def step(run: Run) -> None:
    """Forward and backward of each model, over the base model's, and how often the host waits for the GPU in it."""
    with _process_group(run) as (sizes, inputs):
        steps = {
            name: functools.partial(models.training_step, models.make_model(sizes, dmc, DTYPE).train(), inputs)
            for name, dmc in SOURCES.items()
        }
        time_rows(run, steps, ["base"], seq=run.sizes.step_seq, layers=run.sizes.step_layers)
        for name, call in steps.items():
            run.attempt(f"waits, {name}", functools.partial(_waits_row, run, name, call))


def _waits_row(run: Run, name: str, call: Any) -> None:
    run.row("waits", name=name, layers=run.sizes.step_layers, **host_waits(call, run.device))


def step_numbers(run: Run) -> None:
    """Loss and gradients of each model in bf16 against the same weights in float64."""
    with _process_group(run) as (sizes, inputs):
        bound: float | None = None
        for name, dmc in SOURCES.items():
            loss, gradient = _result(models.make_model(sizes, dmc, DTYPE).train(), inputs)
            reference = models.make_model(sizes, dmc, DTYPE).double().train()
            for layer in dmc_layers(reference):
                layer.core_attention = ReferenceAttention()
            expected_loss, expected_gradient = _result(reference, inputs)
            del reference
            error = relative_error(gradient, expected_gradient)
            run.row("check", **checked(f"step, {name}", "loss", relative_error(loss, expected_loss), LOSS_BOUND))
            run.row("check", **checked(f"step, {name}", "d all weights", error, bound))
            if dmc is None:
                bound = GRADIENT_FACTOR * error


class ReferenceAttention(torch.nn.Module):
    """Stands in for the core attention where no flash kernel takes float64; without a local window."""

    def forward(self, query: Tensor, key: Tensor, value: Tensor, *merged: Tensor) -> Tensor:
        """merged: pooled key, pooled value and merge logits; none for the base model."""
        return dmc_attention(query, *merged, backend="naive") if merged else plain_attention(query, key, value)


def _result(model: torch.nn.Module, inputs: dict[str, Any]) -> tuple[Tensor, Tensor]:
    """The loss of a step and all weights' gradients in one vector."""
    loss = models.training_step(model, inputs)
    return loss, torch.cat([p.grad.flatten().double() for p in model.parameters() if p.grad is not None])
