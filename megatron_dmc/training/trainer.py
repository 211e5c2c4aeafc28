"""Runs a recipe: pretraining or the phases of a retrofit, on megatron-core's own parts."""

import math
import time
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
from megatron.core import parallel_state
from megatron.core.distributed import DistributedDataParallel, DistributedDataParallelConfig, finalize_model_grads
from megatron.core.pipeline_parallel import get_forward_backward_func
from torch import Tensor

from megatron_dmc.checkpoint import SavedModel
from megatron_dmc.data import SampleDataset, build_datasets, check_reach, global_batch
from megatron_dmc.data.tokenizer import check_vocabulary, load_tokenizer
from megatron_dmc.distributed.world import seed_weights
from megatron_dmc.errors import DMCError
from megatron_dmc.model.attention import StepContext
from megatron_dmc.model.compression_loss import compression_ratio, merge_fraction_target
from megatron_dmc.model.gpt import dmc_layers
from megatron_dmc.recipe import Recipe, check_batch
from megatron_dmc.training.build import build_chunks, check_machine, freeze_base, megatron_config
from megatron_dmc.training.forward_step import DistillationStep, forward_step, on_this_context_rank
from megatron_dmc.training.monitor import Monitor, StepRecord, measure_memory_bytes
from megatron_dmc.training.optimizer import build_optimizer, gather_parameters, phase_scheduler, restart_optimizer
from megatron_dmc.training.progress import TrainingProgress
from megatron_dmc.training.run_state import RunStore, check_writable
from megatron_dmc.training.schedule import StepPlan, integer_ratios, plan_step
from megatron_dmc.training.signals import StopRequest


class TrainingError(DMCError, RuntimeError):
    """A run that cannot go on. The message says why and what to do."""


@dataclass
class StepResult:
    """Means and sums over a step's global batch, the same on every rank.

    Attributes:
        loss: LM loss, nats per token; NaN where no token counts (chat data whose batch holds no assistant's words).
        distillation_loss: nats per token; 0 without a teacher.
        tokens: that count in the losses.
        counts: [3, layers, kv_heads], see DecisionStatistics.
        stop: whether any rank was asked to stop.
    """

    loss: float
    distillation_loss: float
    tokens: float
    counts: Tensor
    stop: bool = False
    grad_norm: float = 0.0

    @property
    def merges(self) -> bool:
        return bool(self.counts[2].sum() > 0)

    def merge_fraction(self, *, noisy: bool) -> float:
        return float(self.counts[0 if noisy else 1].sum() / self.counts[2].sum())

    def ratio(self, *, noisy: bool) -> float | None:
        return 1 / (1 - self.merge_fraction(noisy=noisy)) if self.merges else None

    @property
    def layer_head_ratio(self) -> Tensor | None:
        return compression_ratio(self.counts[1], self.counts[2]) if self.merges else None


class Trainer:
    """One run of a recipe on this process's share of the model. torch.distributed must be initialized.

    Attributes:
        step: steps done.
        stopped: whether ``run`` ended early because a rank was asked to; the run is saved and can go on.
    """

    def __init__(self, recipe: Recipe, stop_request: StopRequest | None = None) -> None:
        self.recipe = recipe
        self.stop_request = stop_request or StopRequest()
        self.stopped = False
        check_machine(recipe)
        check_writable(Path(recipe.checkpoint.directory))
        start, teacher = _open_checkpoints(recipe)
        tokenizer = load_tokenizer(recipe.data.tokenizer)
        check_vocabulary(tokenizer, recipe.model.vocab_size)
        check_batch(recipe, parallel_state.get_data_parallel_world_size())
        check_reach(recipe)
        training = recipe.training
        self.train_data, self.valid_data = build_datasets(
            recipe.data,
            tokenizer,
            recipe.total_steps * training.global_batch_size,
            max(recipe.monitor.eval_samples, training.global_batch_size) if recipe.data.valid else 0,
        )
        seed_weights(training.seed)
        self.model = self._build_model()
        self.forward_step = self._build_forward_step(teacher)
        self.optimizer = build_optimizer(recipe, self.model)
        self.config.grad_scale_func = self.optimizer.scale_loss
        self.config.finalize_model_grads_func = finalize_model_grads
        self.store = RunStore(recipe, self.model, self.optimizer, start)
        self.step = 0
        # Noise-free share of merged tokens in the last global batch: what the compression loss' gate looks at.
        self.merge_fraction = 0.0

    # Building

    def _build_model(self) -> list[torch.nn.Module]:
        recipe, parallel = self.recipe, self.recipe.parallel
        self.config = megatron_config(recipe)
        chunks = build_chunks(recipe, self.config, recipe.dmc if recipe.merges else None)
        if recipe.trains_adapter:
            freeze_base(chunks)
        settings = DistributedDataParallelConfig(
            use_distributed_optimizer=parallel.use_distributed_optimizer,
            grad_reduce_in_fp32=True,
            overlap_grad_reduce=parallel.overlap,
            overlap_param_gather=parallel.overlap and parallel.use_distributed_optimizer,
        )
        wrapped = [
            DistributedDataParallel(self.config, settings, chunk, disable_bucketing=i > 0)
            for i, chunk in enumerate(chunks)
        ]
        if parallel.overlap:
            no_sync = [chunk.no_sync for chunk in wrapped]
            self.config.no_sync_func = no_sync if len(wrapped) > 1 else no_sync[0]
        return list(wrapped)

    def _build_forward_step(self, teacher: SavedModel | None) -> Any:
        """What get_forward_backward_func calls for every micro-batch of training."""
        recipe = self.recipe
        if not recipe.distills:
            return forward_step
        if teacher is None:
            return DistillationStep(recipe.distillation, self.model, None)
        chunks = build_chunks(recipe, self.config, None)
        for chunk in chunks:
            chunk.eval().requires_grad_(False)
        teacher.load_into(chunks, recipe)
        return DistillationStep(recipe.distillation, self.model, chunks)

    def _layers(self) -> list[Any]:
        return [layer for chunk in self.model for layer in dmc_layers(chunk)]

    # Running

    def run(self) -> StepResult | None:
        """Trains to the end of the recipe (or ``training.exit_after_steps``); resumes from ``latest`` if there is one.

        A request to stop is carried out at the end of a step: a full checkpoint is saved, and ``stopped`` is set.

        Returns:
            The last evaluation on held-out samples, or None without held-out data.
        """
        recipe = self.recipe
        self.step, self.merge_fraction = self.store.load()
        last_step = recipe.total_steps
        if recipe.training.exit_after_steps is not None:
            last_step = min(last_step, self.step + recipe.training.exit_after_steps)
        due = integer_ratios(recipe.phases, recipe.dmc) if recipe.checkpoint.save_every_integer_ratio else {}
        # Statistics and losses are the same everywhere; one rank writes them.
        writes = dist.get_rank() == 0
        evaluation: StepResult | None = None
        with (
            TrainingProgress(
                recipe.total_steps, done_steps=self.step, enabled=writes and recipe.monitor.progress_bar
            ) as progress,
            _monitor(recipe, self.step, writes) as monitor,
            self.store,
        ):
            scheduler: Any = None
            while self.step < last_step and not self.stopped:
                self.store.poll()
                plan = plan_step(recipe.phases, recipe.dmc, self.step)
                if scheduler is None or plan.step_in_phase == 0:
                    if plan.step_in_phase == 0:
                        restart_optimizer(self.optimizer)
                    scheduler = phase_scheduler(
                        self.optimizer, plan.phase, recipe.training.weight_decay, plan.step_in_phase
                    )
                began = time.perf_counter()
                learning_rate = self.optimizer.param_groups[0]["lr"]
                result = self._train_step(plan)
                scheduler.step(increment=1)
                self.step += 1
                if result.merges:
                    self.merge_fraction = result.merge_fraction(noisy=False)
                if plan.step_in_phase + 1 == plan.phase.steps and plan.phase.kind == "zero_out":
                    self._clear_decision_channel()
                record = self._record(plan, result, learning_rate, time.perf_counter() - began)
                progress.update(record)
                last = self.step == recipe.total_steps
                if monitor is not None and (self.step % recipe.monitor.log_interval == 0 or last):
                    monitor.log_step(record)
                if _is_due(self.step, recipe.monitor.eval_interval, last):
                    evaluation = self.evaluate(plan)
                    if evaluation is not None:
                        _report(evaluation, self.step, progress, monitor)
                for ratio, step in due.items():
                    if step == self.step:
                        self.store.save_weights(f"cr_{ratio}", self.step, plan.phase_index, result.ratio(noisy=False))
                if last:
                    self.store.save_weights("final", self.step, plan.phase_index, result.ratio(noisy=False))
                self.stopped = result.stop and self.step < last_step
                if _is_due(self.step, recipe.checkpoint.save_interval, self.step == last_step or self.stopped):
                    # First: a resumed run writes no point before its checkpoint again.
                    if monitor is not None:
                        monitor.flush()
                    self.store.save_full(self.step, plan.phase_index, result.ratio(noisy=False), self.merge_fraction)
                if self.stopped:
                    self.store.wait()
                    progress.message(
                        f"asked to stop: saved after step {self.step}; the same command goes on from there"
                    )
        return evaluation

    def _train_step(self, plan: StepPlan) -> StepResult:
        recipe = self.recipe
        micro_batches = self._micro_batches(self.train_data, self.step * recipe.training.global_batch_size)
        context = StepContext(plan.merging, plan.channel_scale, self._alpha_gradient(plan, micro_batches))
        for layer in self._layers():
            layer.step = context
            layer.statistics.reset()
        for chunk in self.model:
            chunk.train()
            chunk.zero_grad_buffer()  # type: ignore[operator]
        self.optimizer.zero_grad()
        outputs = self._forward_backward(micro_batches)
        updated, grad_norm, _ = self.optimizer.step()
        result = self._reduce(outputs)
        result.grad_norm = float(grad_norm)
        finite = math.isfinite(result.loss) or not result.tokens
        if not (finite and math.isfinite(result.grad_norm) and updated):
            raise TrainingError(
                f"step {self.step + 1} has loss {result.loss} and gradient norm {result.grad_norm}: training diverged; lower "
                f"phases[{plan.phase_index}].lr and resume from the last checkpoint"
            )
        return result

    def _micro_batches(self, data: SampleDataset, first_sample: int) -> list[dict[str, Tensor]]:
        """This rank's share of the global batch; which samples it holds is a function of their global numbers alone."""
        size = self.recipe.training.micro_batch_size
        replicas, replica = parallel_state.get_data_parallel_world_size(), parallel_state.get_data_parallel_rank()
        rounds = self.recipe.training.global_batch_size // (size * replicas)
        begins = [first_sample + (i * replicas + replica) * size for i in range(rounds)]
        return [_to_device(on_this_context_rank(global_batch(data, range(begin, begin + size)))) for begin in begins]

    def _alpha_gradient(self, plan: StepPlan, micro_batches: list[dict[str, Tensor]]) -> float:
        """What every alpha of this step gets: the hinge's slope -lambda / (alphas of the global batch) while the gate is open.

        megatron-core divides all gradients by the global batch's valid tokens; that is undone here.
        """
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
            # Teacher and student travel side by side.
            micro_batch_size=len(micro_batches[0]["tokens"]) * (1 if evaluates or not self.recipe.distills else 2),
            forward_only=evaluates,
        )
        return [output["sums"] for output in outputs]

    def _reduce(self, outputs: list[Tensor]) -> StepResult:
        """The step's one message: losses of the last stage, decision counts of every layer, and requests to stop, summed."""
        model = self.recipe.model
        device = torch.device("cuda") if torch.cuda.is_available() else torch.device("cpu")
        counts = torch.zeros(3, model.num_layers, model.num_query_groups, dtype=torch.float64, device=device)
        for layer in self._layers():
            if layer.statistics.counts is not None:
                heads = layer.kv_heads
                counts[:, layer.layer_number - 1, heads.start : heads.stop] += layer.statistics.counts
        losses = torch.zeros(3, dtype=torch.float64, device=device)
        if outputs and parallel_state.get_tensor_model_parallel_rank() == 0:
            losses += torch.stack(outputs).sum(0)
        stop = losses.new_tensor([self.stop_request.received is not None])
        message = torch.cat([counts.flatten(), losses, stop])
        dist.all_reduce(message)
        total, apart, tokens, stops = message[-4:].cpu()
        return StepResult(
            float(total / tokens),
            float(apart / tokens),
            float(tokens),
            message[:-4].view_as(counts).cpu(),
            stop=bool(stops > 0),
        )

    def _clear_decision_channel(self) -> None:
        for layer in self._layers():
            layer.clear_decision_channel()
        self.optimizer.reload_model_params()

    @torch.no_grad()
    def evaluate(self, plan: StepPlan) -> StepResult | None:
        """Loss and noise-free decisions on the held-out samples; None without any, or if none of their tokens counts.

        The plan says whether anything merges.
        """
        if self.valid_data is None:
            return None
        per_batch = self.recipe.training.global_batch_size
        batches = max(1, self.recipe.monitor.eval_samples // per_batch)
        if len(self.valid_data) < batches * per_batch:
            return None
        for layer in self._layers():
            layer.step = StepContext(plan.merging, plan.channel_scale)
            layer.statistics.reset()
        gather_parameters(self.model)
        for chunk in self.model:
            chunk.eval()
        outputs = []
        for i in range(batches):
            micro_batches = self._micro_batches(self.valid_data, i * per_batch)
            outputs += self._forward_backward(micro_batches, evaluates=True)
        result = self._reduce(outputs)
        for chunk in self.model:
            chunk.train()
        return result if result.tokens else None

    def _record(self, plan: StepPlan, result: StepResult, learning_rate: float, seconds: float) -> StepRecord:
        recipe = self.recipe
        samples = self.step * recipe.training.global_batch_size
        loss = None
        if plan.target_compression_ratio is not None:
            missing = merge_fraction_target(plan.target_compression_ratio) - result.merge_fraction(noisy=True)
            loss = recipe.dmc.loss_coefficient * max(0.0, missing)
        return StepRecord(
            step=self.step,
            phase=plan.phase.kind,
            lm_loss=result.loss,
            distillation_loss=result.distillation_loss if recipe.distills else None,
            learning_rate=learning_rate,
            grad_norm=result.grad_norm,
            tokens_per_second=recipe.training.global_batch_size * recipe.data.sequence_length / seconds,
            memory_bytes=measure_memory_bytes(),
            consumed_samples=samples,
            consumed_tokens=samples * recipe.data.sequence_length,
            compression_loss=loss,
            compression_ratio=result.ratio(noisy=False),
            noisy_compression_ratio=result.ratio(noisy=True),
            target_compression_ratio=plan.target_compression_ratio,
            layer_head_ratio=result.layer_head_ratio,
        )


def _to_device(batch: dict[str, Tensor]) -> dict[str, Tensor]:
    if not torch.cuda.is_available():
        return batch
    return {name: tensor.cuda(non_blocking=True) for name, tensor in batch.items()}


def _is_due(step: int, interval: int, last: bool) -> bool:
    return last or (interval > 0 and step % interval == 0)


class _NoMonitor:
    def __enter__(self) -> None:
        return None

    def __exit__(self, *_: object) -> None:
        return None


def _monitor(recipe: Recipe, step: int, writes: bool) -> Monitor | _NoMonitor:
    if recipe.monitor.tensorboard is None or not writes:
        return _NoMonitor()
    return Monitor(
        Path(recipe.monitor.tensorboard),
        recipe.model.num_layers,
        recipe.model.num_query_groups,
        first_step=step + 1 if step else 0,
        heatmap_interval=recipe.monitor.heatmap_interval,
    )


def _open_checkpoints(recipe: Recipe) -> tuple[SavedModel | None, SavedModel | None]:
    """What the run starts from, and what teaches it, as far as the recipe names them; both must fit it."""
    start = teacher = None
    load_base = recipe.checkpoint.load_base
    if load_base is not None:
        start = SavedModel.open(load_base)
        start.check_fits(recipe)
    if recipe.teacher is not None:
        teacher = start if recipe.teacher == load_base and start is not None else SavedModel.open(recipe.teacher)
        teacher.check_teaches(recipe)
    return start, teacher


def _report(evaluation: StepResult, step: int, progress: TrainingProgress, monitor: Monitor | None) -> None:
    ratio = evaluation.ratio(noisy=False)
    merged = "" if ratio is None else f", compression ratio {ratio:.2f}"
    progress.message(f"held-out loss after {step} steps: {evaluation.loss:.4f} nats per token{merged}")
    if monitor is not None:
        values = {"lm_loss": evaluation.loss}
        monitor.log_evaluation(step, values if ratio is None else values | {"compression_ratio": ratio})
