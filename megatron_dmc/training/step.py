"""One global batch through this process's share of the model: a training step, or a part of an evaluation."""

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
import torch.distributed as dist
from megatron.core import parallel_state
from megatron.core.distributed import finalize_model_grads
from megatron.core.pipeline_parallel import get_forward_backward_func
from torch import Tensor

from megatron_dmc.checkpoint import SavedModel
from megatron_dmc.data import SampleDataset, SecondCopies, global_batch
from megatron_dmc.model.attention import StepContext
from megatron_dmc.model.compression_loss import CLOSE, compression_ratio, merge_fraction_target
from megatron_dmc.model.gpt import dmc_layers
from megatron_dmc.recipe import Recipe
from megatron_dmc.training.build import build_chunks, freeze_base, megatron_config, wrap_chunks
from megatron_dmc.training.forward_step import build_forward_step, forward_step, on_this_context_rank
from megatron_dmc.training.optimizer import build_optimizer, gather_parameters
from megatron_dmc.training.schedule import StepPlan, plan_step

# Logits.
LONGEST_OFFSET_STEP = 0.5
# Of a batch's error, that moves the offset at once: at the phase's learning rate, and at least.
OFFSET_GAIN, LEAST_OFFSET_GAIN = 0.5, 0.05
# Of what a batch says of the multiplier, that is believed at once.
MULTIPLIER_GAIN = 0.5


@dataclass
class StepResult:
    """Means and sums over a step's global batch, the same on every rank.

    Attributes:
        loss: LM loss, nats per token; NaN where no token counts (chat data whose batch holds no assistant's words).
        distillation_loss: nats per token; 0 without a teacher.
        tokens: that count in the losses.
        counts: [4, layers, kv_heads], see DecisionStatistics.
        slopes: [2], see OffsetSlopes; 0 where nothing asks for them.
        stop: whether any rank was asked to stop.
        grad_norm: before clipping.
        updated: whether the optimizer took the step.
        recall_loss: of an evaluation, nats per token on second copies of held-out text; None: no token there counts, or the
            run's model has no decisions.
        base_recall_loss: the same of the base; None: not known.
    """

    loss: float
    distillation_loss: float
    tokens: float
    counts: Tensor
    slopes: Tensor
    stop: bool = False
    grad_norm: float = 0.0
    updated: bool = True
    recall_loss: float | None = None
    base_recall_loss: float | None = None

    @property
    def merges(self) -> bool:
        return bool(self.counts[2].sum() > 0)

    def merge_fraction(self, *, noisy: bool) -> float:
        return float(self.counts[0 if noisy else 1].sum() / self.counts[2].sum())

    def ratio(self, *, noisy: bool) -> float | None:
        return 1 / (1 - self.merge_fraction(noisy=noisy)) if self.merges else None

    @property
    def recall_gap(self) -> float | None:
        """Nats per token that copying costs more than it costs the base."""
        if self.recall_loss is None or self.base_recall_loss is None:
            return None
        return self.recall_loss - self.base_recall_loss

    @property
    def layer_head_ratio(self) -> Tensor | None:
        return compression_ratio(self.counts[1], self.counts[2]) if self.merges else None


class StepRunner:
    """The model, its optimizer, and what a step does with them.

    Args:
        recipe: checked already.
        train_data, valid_data: the run's samples; ``valid_data`` None: nothing is held out.
        teacher: a base that teaches, besides an adapter's own; None: there is none.
        asked_to_stop: what this rank answers at the end of a step.

    Attributes:
        step: steps done.
        merge_fraction: noise-free share of merged tokens in the last global batch: what the compression loss' gate looks at.
        multiplier: of ``ratio_control: offset``, nats per merged token: what one more of them costs; None: not measured yet.
    """

    def __init__(
        self,
        recipe: Recipe,
        train_data: SampleDataset,
        valid_data: SampleDataset | None,
        teacher: SavedModel | None,
        asked_to_stop: Callable[[], bool],
    ) -> None:
        self.recipe, self.train_data, self.valid_data = recipe, train_data, valid_data
        self._asked_to_stop = asked_to_stop
        self.config = megatron_config(recipe)
        chunks = build_chunks(recipe, self.config, recipe.dmc if recipe.merges else None)
        if recipe.trains_adapter:
            freeze_base(chunks)
        self.model = wrap_chunks(recipe, self.config, chunks)
        self.forward_step = build_forward_step(recipe, self.config, self.model, teacher)
        self.optimizer = build_optimizer(recipe, self.model)
        self.config.grad_scale_func = self.optimizer.scale_loss
        self.config.finalize_model_grads_func = finalize_model_grads
        self.step = 0
        self.merge_fraction = 0.0
        self.multiplier: float | None = None

    def _layers(self) -> list[Any]:
        return [layer for chunk in self.model for layer in dmc_layers(chunk)]

    def _train_step(self, plan: StepPlan) -> StepResult:
        micro_batches = self._micro_batches(self.train_data, self.step * self.recipe.training.global_batch_size)
        gradient, uncounted = self._alpha_gradient(plan, micro_batches), self._repeated(micro_batches)
        self._prepare(StepContext(plan.merging, plan.channel_scale, gradient, uncounted))
        for chunk in self.model:
            chunk.train()
            chunk.zero_grad_buffer()  # type: ignore[operator]
        self.optimizer.zero_grad()
        outputs = self._forward_backward(micro_batches)
        learning_rate = self.optimizer.param_groups[0]["lr"]
        updated, grad_norm, _ = self.optimizer.step()
        result = self._reduce(outputs)
        if plan.target_compression_ratio is not None and self.recipe.dmc.ratio_control == "offset":
            target = plan.target_compression_ratio
            gain = offset_gain(learning_rate / plan.phase.lr)
            self._move_offset(offset_step(result.counts, target, self._next_target() or target, gain))
            self.multiplier = next_multiplier(self.multiplier, *result.slopes.tolist())
        result.grad_norm, result.updated = float(grad_norm), bool(updated)
        return result

    @torch.no_grad()
    def _forward_step(self) -> StepResult:
        """The base reads the step's samples."""
        return self._read(self.train_data, range(self.step, self.step + 1), StepContext(merging=False))

    @torch.no_grad()
    def evaluate(self, plan: StepPlan) -> StepResult | None:
        """Loss and noise-free decisions on the held-out samples; None without any, or if none of their tokens counts.

        A model with decisions reads them once more, each as a text twice: that is the result's ``recall_loss``.
        Training goes on as if it had not been called. The plan, of the step before, says whether anything merges.
        """
        context = StepContext(plan.has_decided, plan.channel_scale)
        result = self._evaluate(self.valid_data, context)
        if result is not None and self.recipe.merges:
            copies = self._evaluate(self._second_copies(), context)
            if copies is not None:
                result.recall_loss = copies.loss
                result.stop |= copies.stop
        return result

    @torch.no_grad()
    def measure_base_recall(self) -> float | None:
        """``StepResult.recall_loss`` of this model without decisions: the base's as long as no other weight has changed."""
        result = self._evaluate(self._second_copies(), StepContext(merging=False))
        return None if result is None else result.loss

    def _second_copies(self) -> SecondCopies | None:
        return None if self.valid_data is None else SecondCopies(self.valid_data)

    def _evaluate(self, data: SampleDataset | None, context: StepContext) -> StepResult | None:
        """None without samples, or if none of their tokens counts."""
        if data is None:
            return None
        per_batch = self.recipe.training.global_batch_size
        # No sample twice, but where there are too few for one global batch.
        batches = max(1, min(self.recipe.monitor.eval_samples, len(data)) // per_batch)
        if len(data) < batches * per_batch:
            return None
        result = self._read(data, range(batches), context)
        return result if result.tokens else None

    def _read(self, data: SampleDataset, batches: range, context: StepContext) -> StepResult:
        """Global batches with these numbers, forward only and without noise; training then goes on as before."""
        self._prepare(context)
        gather_parameters(self.model)
        for chunk in self.model:
            chunk.eval()
        outputs = []
        for i in batches:
            micro_batches = self._micro_batches(data, i * self.recipe.training.global_batch_size)
            outputs += self._forward_backward(micro_batches, evaluates=True)
        result = self._reduce(outputs)
        for chunk in self.model:
            chunk.train()
        return result

    def _repeated(self, micro_batches: list[dict[str, Tensor]]) -> Tensor | None:
        """Numbers of samples that are a text twice. A second copy is easier to do without: they do not count in the ratio,
        which is to be that of text as it is. None: there are no others."""
        if self.recipe.repeat_fraction == 1:
            return None
        numbers = [batch["sample_index"][batch["repeated"]] for batch in micro_batches if "repeated" in batch]
        return torch.cat(numbers) if numbers else None

    def _prepare(self, context: StepContext) -> None:
        """Tells every layer what the next passes are, and forgets the counts of those before."""
        for layer in self._layers():
            layer.step = context
            layer.statistics.reset()

    def _micro_batches(self, data: SampleDataset, first_sample: int) -> list[dict[str, Tensor]]:
        """This rank's share of the global batch; which samples it holds depends only on their global numbers."""
        size = self.recipe.training.micro_batch_size
        replicas, replica = parallel_state.get_data_parallel_world_size(), parallel_state.get_data_parallel_rank()
        rounds = self.recipe.training.global_batch_size // (size * replicas)
        begins = [first_sample + (i * replicas + replica) * size for i in range(rounds)]
        return [_to_device(on_this_context_rank(global_batch(data, range(begin, begin + size)))) for begin in begins]

    def _alpha_gradient(self, plan: StepPlan, micro_batches: list[dict[str, Tensor]]) -> float:
        """What every alpha of this step gets: minus the multiplier, or, while the gate is open, the hinge's slope -lambda /
        (alphas of the global batch).

        megatron-core divides all gradients by the global batch's valid tokens; that is undone here.
        """
        if self.recipe.dmc.ratio_control == "offset":
            return -(self.multiplier or 0.0)
        if not plan.merging or self.merge_fraction >= merge_fraction_target(plan.target_compression_ratio or 1.0):
            return 0.0
        recipe = self.recipe
        valid = torch.stack([batch["loss_mask"].sum() for batch in micro_batches]).sum()
        dist.all_reduce(valid, group=parallel_state.get_data_parallel_group(with_context_parallel=True))
        alphas = (
            recipe.model.num_layers
            * recipe.model.num_query_groups
            * recipe.data.sequence_length
            * recipe.training.global_batch_size
        )
        return -recipe.dmc.loss_coefficient * float(valid) / alphas

    def _forward_backward(self, micro_batches: list[dict[str, Tensor]], *, evaluates: bool = False) -> list[Tensor]:
        """Sums of LM loss, distillation loss and tokens of every micro-batch on the last pipeline stage, else nothing."""
        iterators = [iter(micro_batches) for _ in self.model]
        outputs = get_forward_backward_func()(
            forward_step_func=forward_step if evaluates else self.forward_step,
            data_iterator=iterators if len(iterators) > 1 else iterators[0],
            model=self.model if len(self.model) > 1 else self.model[0],
            num_microbatches=len(micro_batches),
            seq_length=self.recipe.data.sequence_length,
            # The teacher's samples and the student's are one batch.
            micro_batch_size=len(micro_batches[0]["tokens"]) * (1 if evaluates or not self.recipe.distills else 2),
            forward_only=evaluates,
        )
        return [output["sums"] for output in outputs]

    def _reduce(self, outputs: list[Tensor]) -> StepResult:
        """The step's one message: losses of the last stage, decision counts of every layer, and requests to stop, summed."""
        model = self.recipe.model
        device = torch.device("cuda") if torch.cuda.is_available() else torch.device("cpu")
        counts = torch.zeros(4, model.num_layers, model.num_query_groups, dtype=torch.float64, device=device)
        slopes = torch.zeros(2, dtype=torch.float64, device=device)
        for layer in self._layers():
            if layer.statistics.counts is not None:
                heads = layer.kv_heads
                counts[:, layer.layer_number - 1, heads.start : heads.stop] += layer.statistics.counts
            if layer.statistics.slopes is not None:
                slopes += layer.statistics.slopes
        losses = torch.zeros(3, dtype=torch.float64, device=device)
        if outputs and parallel_state.get_tensor_model_parallel_rank() == 0:
            losses += torch.stack(outputs).sum(0)
        stop = losses.new_tensor([self._asked_to_stop()])
        message = torch.cat([counts.flatten(), slopes, losses, stop])
        dist.all_reduce(message)
        *slope, total, apart, tokens, stops = message[-6:].cpu()
        return StepResult(
            float(total / tokens),
            float(apart / tokens),
            float(tokens),
            message[:-6].view_as(counts).cpu(),
            torch.stack(slope),
            stop=bool(stops > 0),
        )

    def _next_target(self) -> float | None:
        """The compression ratio that the step after this one aims at; None: it is the last, or merges nothing."""
        if self.step + 1 >= self.recipe.total_steps:
            return None
        return plan_step(self.recipe.phases, self.recipe.dmc, self.step + 1).target_compression_ratio

    def _move_offset(self, step: float) -> None:
        for layer in self._layers():
            layer.decision.offset += step

    def _clear_decision_channel(self) -> None:
        for layer in self._layers():
            layer.clear_decision_channel()
        self.optimizer.reload_model_params()


def offset_gain(part: float) -> float:
    """Of a batch's error, how much moves the offset.

    A batch is a sample of the text: its error is that of the offset and chance. The offset errs because the decisions move, by
    as much as the learning rate says. Once they hardly do, what is left is chance, and the offset is to average over batches.

    Args:
        part: the step's learning rate over its phase's.
    """
    return max(LEAST_OFFSET_GAIN, OFFSET_GAIN * part)


def offset_step(counts: Tensor, target: float, next_target: float, gain: float) -> float:
    """By how much to move the decisions' offset after a global batch, in logits, cut at LONGEST_OFFSET_STEP.

    Newton's step by what the target rises, and by a part of what the batch missed.

    Args:
        counts: [4, layers, kv_heads], see DecisionStatistics.
        target, next_target: compression ratios of this global batch and of the next.
        gain: see :func:`offset_gain`.
    """
    _, merged, tokens, close = counts.sum(dim=(1, 2)).tolist()
    if not tokens:
        return 0.0
    # Merged tokens per logit of offset. Where hardly any decision is close, the longest step finds some.
    slope = max(close / (2 * CLOSE), 1e-3 * tokens)
    wanted, next_wanted = (merge_fraction_target(ratio) * tokens for ratio in (target, next_target))
    step = (next_wanted - wanted + gain * (wanted - merged)) / slope
    return max(-LONGEST_OFFSET_STEP, min(LONGEST_OFFSET_STEP, step))


def next_multiplier(last: float | None, loss_slope: float, merges_slope: float) -> float | None:
    """The multiplier of the next step: that with which an offset would change the loss no more, smoothed over steps.

    Args:
        last: the multiplier of this step; None: there was none.
        loss_slope, merges_slope: of this step, see OffsetSlopes; the loss with the multiplier in it.
    """
    if not merges_slope:
        return last
    missing = loss_slope / merges_slope
    return missing if last is None else last + MULTIPLIER_GAIN * missing


def _to_device(batch: dict[str, Tensor]) -> dict[str, Tensor]:
    """Document starts stay on the host, where the places of documents are computed without waiting for the device."""
    if not torch.cuda.is_available():
        return batch
    return {
        name: tensor if name == "document_starts" else tensor.cuda(non_blocking=True) for name, tensor in batch.items()
    }
