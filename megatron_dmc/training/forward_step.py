"""One micro-batch through this rank's part of the model: the language-model loss, and the KL to a teacher."""

from collections.abc import Callable, Iterator, Sequence
from functools import partial
from typing import Any

import torch
from megatron.core import parallel_state
from megatron.core.tensor_parallel import vocab_parallel_cross_entropy
from megatron.core.transformer.transformer_config import TransformerConfig
from megatron.core.utils import get_attr_wrapped_model, get_model_config
from torch import Tensor

from megatron_dmc.checkpoint import SavedModel
from megatron_dmc.model.attention import StepContext
from megatron_dmc.model.distillation_loss import distillation_loss
from megatron_dmc.model.documents import PackedDocuments, pack_documents
from megatron_dmc.model.gpt import dmc_layers
from megatron_dmc.ops.context_parallel import local_positions
from megatron_dmc.recipe import DistillationConfig, Recipe
from megatron_dmc.training.build import build_chunks

Batch = dict[str, Tensor]
Output = tuple[Tensor, Any]


def on_this_context_rank(batch: Batch) -> Batch:
    """[b, s] -> this context-parallel rank's tokens [b, s / ranks]; document_starts and what is [b] as it is."""
    ranks = parallel_state.get_context_parallel_world_size()
    # Not megatron-core's get_batch_on_this_cp_rank, whose arguments differ between versions.
    mine = local_positions(batch["tokens"].shape[1] // ranks, parallel_state.get_context_parallel_group())
    return {name: x if name == "document_starts" or x.dim() == 1 else x[:, mine] for name, x in batch.items()}


def build_forward_step(
    recipe: Recipe, config: TransformerConfig, model_chunks: Sequence[torch.nn.Module], teacher: SavedModel | None
) -> Callable[[Iterator[Batch], torch.nn.Module], Output]:
    """What get_forward_backward_func calls for every micro-batch of training; loads the teacher if there is one."""
    if not recipe.distills:
        return forward_step
    if teacher is None:
        return DistillationStep(recipe.distillation, model_chunks, None)
    teachers = build_chunks(recipe, config, None)
    for chunk in teachers:
        chunk.eval().requires_grad_(False)
    teacher.load_into(teachers, recipe)
    return DistillationStep(recipe.distillation, model_chunks, teachers)


def forward_step(batches: Iterator[Batch], model: torch.nn.Module) -> Output:
    """Without a teacher. For get_forward_backward_func."""
    batch = next(batches)
    # The attention mask argument carries the samples' numbers, see DMCSelfAttention.
    inputs = batch["tokens"], batch["position_ids"], batch["sample_index"]
    losses = model(*inputs, labels=batch["labels"], packed_seq_params=_packed(batch))
    return losses, partial(_language_model_loss, loss_mask=batch["loss_mask"])


class DistillationStep:
    """With a teacher: (1 - weight) LM loss + weight KL. For get_forward_backward_func, with twice the micro-batch size.

    Teacher and student go through a pipeline stage one after the other, the teacher without gradients, and travel to the
    next stage side by side in one message, as the two halves of a micro-batch.

    Args:
        settings: the losses' mixture.
        model_chunks: this rank's parts of the student.
        teacher_chunks: a frozen copy of the base, split in the same way; None where the student's own weights are the
            base's as long as nothing merges.
    """

    def __init__(
        self,
        settings: DistillationConfig,
        model_chunks: Sequence[torch.nn.Module],
        teacher_chunks: Sequence[torch.nn.Module] | None,
    ) -> None:
        self.settings = settings
        teachers = model_chunks if teacher_chunks is None else teacher_chunks
        self.teachers = {id(chunk): teacher for chunk, teacher in zip(model_chunks, teachers, strict=True)}

    def __call__(self, batches: Iterator[Batch], model: torch.nn.Module) -> Output:
        batch = next(batches)
        teacher = self.teachers[id(model)]
        # Both streams of the stage before, on all but the first.
        received = get_attr_wrapped_model(model, "decoder").input_tensor
        student_input, teacher_input = (None, None) if received is None else received.chunk(2, dim=1)
        packed = _packed(batch)
        with torch.no_grad(), _Unmerged(teacher):
            taught = _run(teacher, batch, packed, teacher_input)
        out = _run(model, batch, packed, student_input)
        if not get_attr_wrapped_model(model, "post_process"):
            return torch.cat([out, taught], dim=1), None
        # Sequence first, as the output layer makes and wants it: from a gradient in another order its backward pass would make
        # one small product per token.
        out, taught = out.transpose(0, 1).contiguous(), taught.transpose(0, 1)
        settings = self.settings
        divergence = distillation_loss(
            out,
            taught,
            direction=settings.direction,
            temperature=settings.temperature,
            top_k=settings.top_k,
            group=parallel_state.get_tensor_model_parallel_group(),
        )
        # Last: it overwrites float32 logits (of others it makes a copy). With a weight of 1 it is only reported.
        with torch.set_grad_enabled(settings.weight < 1):
            losses = vocab_parallel_cross_entropy(out, batch["labels"].transpose(0, 1).contiguous())
        mask = batch["loss_mask"].transpose(0, 1)
        return losses, partial(_mixed_loss, divergence=divergence, weight=settings.weight, loss_mask=mask)


class _Unmerged:
    """No decisions inside the block. After it the layers do again what they did before, in time for recomputation."""

    def __init__(self, model: torch.nn.Module) -> None:
        self.layers = dmc_layers(model)

    def __enter__(self) -> None:
        self.steps = [layer.step for layer in self.layers]
        for layer in self.layers:
            layer.step = StepContext(merging=False)

    def __exit__(self, *_: object) -> None:
        for layer, step in zip(self.layers, self.steps, strict=True):
            layer.step = step


def _packed(batch: Batch) -> PackedDocuments | None:
    """Where documents begin, if the batch says so; else its samples are one text each."""
    starts = batch.get("document_starts")
    return None if starts is None else pack_documents(starts, batch["tokens"].device)


def _run(model: torch.nn.Module, batch: Batch, packed: PackedDocuments | None, received: Tensor | None) -> Tensor:
    """Hidden states [seq, batch, hidden], or on the last stage logits [batch, seq, vocabulary / tensor-parallel ranks]."""
    get_attr_wrapped_model(model, "set_input_tensor")(received)
    # The losses widen a few tokens' logits at a time; all of them in float32 would be a step's largest tensors.
    narrow = {"fp32_output": False} if get_model_config(model).bf16 else {}
    return model(batch["tokens"], batch["position_ids"], batch["sample_index"], packed_seq_params=packed, **narrow)


def _language_model_loss(losses: Tensor, loss_mask: Tensor) -> tuple[Tensor, Tensor, dict[str, Tensor]]:
    total, tokens = (losses.float() * loss_mask).sum(), loss_mask.sum()
    return total, tokens.to(torch.int), {"sums": _report(total, torch.zeros_like(total), tokens)}


def _mixed_loss(
    losses: Tensor, divergence: Tensor, weight: float, loss_mask: Tensor
) -> tuple[Tensor, Tensor, dict[str, Tensor]]:
    total, apart, tokens = (losses.float() * loss_mask).sum(), (divergence * loss_mask).sum(), loss_mask.sum()
    mixed = (1 - weight) * total + weight * apart
    return mixed, tokens.to(torch.int), {"sums": _report(total, apart, tokens)}


def _report(*sums: Tensor) -> Tensor:
    """float64 [3]: the LM loss' sum, the distillation loss' sum, tokens."""
    return torch.stack([x.detach() for x in sums]).double()
