"""What a run shows of itself while it runs: messages and progress on stderr, curves for TensorBoard."""

import contextlib
import itertools
import sys
from pathlib import Path
from types import TracebackType

import torch
import torch.distributed as dist
from megatron.core import parallel_state

from megatron_dmc.calibration import CalibrationResult
from megatron_dmc.checkpoint import CheckpointError
from megatron_dmc.checkpoint.folder import kept_ratio, read_info
from megatron_dmc.data import distinct_samples
from megatron_dmc.model.compression_loss import merge_fraction_target
from megatron_dmc.recipe import Recipe
from megatron_dmc.recipe.base import vocabulary_line
from megatron_dmc.training import messages
from megatron_dmc.training.build import count_parameters
from megatron_dmc.training.monitor import Monitor, StepRecord, measure_memory_bytes
from megatron_dmc.training.progress import TrainingProgress
from megatron_dmc.training.run_state import RunStore
from megatron_dmc.training.schedule import StepPlan
from megatron_dmc.training.step import StepResult


class Report:
    """One run's progress and curves. Every rank makes one and calls it; only rank 0's prints.

    Args:
        step: steps done before.

    Raises:
        ConfigError: ``monitor.tensorboard`` cannot be written.
    """

    def __init__(self, recipe: Recipe, store: RunStore, step: int) -> None:
        self.recipe, self._store = recipe, store
        # What is below its target: {phase: names}
        self._below: dict[int, list[str]] = {}
        # Phases in which recall was seen to fall behind.
        self._behind: set[int] = set()
        monitor, first = recipe.monitor, dist.get_rank() == 0
        self._monitor = None
        if monitor.tensorboard is not None and first:
            self._monitor = Monitor(
                Path(monitor.tensorboard),
                recipe.model.num_layers,
                recipe.model.num_query_groups,
                first_step=step + 1 if step else 0,
                heatmap_interval=monitor.heatmap_interval,
            )
        self._progress = TrainingProgress(
            recipe.total_steps, done_steps=step, enabled=first, quiet=not monitor.progress_bar
        )

    def __enter__(self) -> "Report":
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, traceback: TracebackType | None
    ) -> None:
        with contextlib.ExitStack() as stack:
            stack.callback(self._progress.close)
            if self._monitor is not None:
                stack.callback(self._monitor.close)

    def step(self, record: StepRecord) -> None:
        """A step that is done."""
        self._progress.update(record)
        last = record.step == self.recipe.total_steps
        if self._monitor is not None and (record.step % self.recipe.monitor.log_interval == 0 or last):
            self._monitor.log_step(record, last=last)

    def evaluation(self, result: StepResult | None, step: int, phase: int) -> None:
        """Held-out loss after so many steps; None: nothing was held out."""
        if result is not None:
            self._progress.message(messages.held_out(result, step))
            warning = messages.recall_behind(self.recipe, result.recall_gap)
            # The run's last evaluation is judged by ``ended``.
            if warning is not None and phase not in self._behind and step < self.recipe.total_steps:
                self._behind.add(phase)
                self._progress.message(warning, important=True)
            if self._monitor is not None:
                values = {
                    "lm_loss": result.loss,
                    "compression_ratio": result.ratio(noisy=False),
                    "recall_loss": result.recall_loss,
                    "recall_gap": result.recall_gap,
                }
                self._monitor.log_evaluation(step, values)
        if step == 0:
            self._progress.start_clock(step)

    def calibration(self, result: CalibrationResult, step: int) -> None:
        """What ``calibrate`` found, after the run's step ``step``."""
        self._progress.message(messages.calibration(result))
        if (warning := messages.useless_calibration(result)) is not None:
            self._progress.message(warning, important=True)
        if self._monitor is not None:
            self._monitor.log_calibration(step, result.r2.tolist())

    def flush(self) -> None:
        """Puts the curves on disk."""
        if self._monitor is not None:
            self._monitor.flush()

    def saved(self) -> None:
        """Reports the checkpoints that are completely written by now. A phase's first miss of a target is named."""
        while self._store.saved:
            checkpoint = self._store.saved.popleft()
            target = kept_ratio(checkpoint.name)
            named = None
            if messages.is_below(checkpoint, target):
                names = self._below.setdefault(checkpoint.info.phase, [])
                named = None if names else target
                names.append(checkpoint.name)
            self._progress.message(messages.saved(checkpoint, named))

    def below_targets(self) -> None:
        """Counts the checkpoints that are below their targets, where not every one was said."""
        names = list(itertools.chain.from_iterable(self._below.values()))
        if len(names) > len(self._below):
            self._progress.message(messages.below_targets(names))

    def stopped(self, step: int) -> None:
        self._progress.message(messages.stopped(step), important=True)

    def ended(self, evaluation: StepResult | None, last: StepResult) -> None:
        """Warns where the run missed its target or lost recall. ``last``: of the last global batch."""
        held_out, gap = (None, None) if evaluation is None else (evaluation.ratio(noisy=False), evaluation.recall_gap)
        for warning in (
            messages.missed_target(self.recipe, held_out, last.ratio(noisy=False)),
            messages.recall_behind(self.recipe, gap),
        ):
            if warning is not None:
                self._progress.message(warning, important=True)


def show_start(recipe: Recipe, model: list[torch.nn.Module], store: RunStore, step: int) -> None:
    """The banner, and where the run begins; all ranks call this together."""
    world = messages.World(
        processes=dist.get_world_size(),
        replicas=parallel_state.get_data_parallel_world_size(),
        gpu=torch.cuda.get_device_name() if torch.cuda.is_available() else None,
    )
    rows, vocabulary = recipe.model.vocab_size, None
    if store.start is not None:
        vocabulary = vocabulary_line(rows, store.start.vocabulary, store.vocabulary or rows)
    lines = messages.banner(recipe, world, *count_parameters(model), vocabulary)
    if recipe.monitor.progress_bar:
        _print(f"{lines}\n{messages.started(store.started_from, step)}")
    if recipe.merges and (warning := messages.without_effect(recipe)) is not None:
        _print(warning)


def show_few_samples(recipe: Recipe, valid_samples: int) -> None:
    """Where there are fewer different samples than the recipe wants: of text to calibrate on, and of held-out text."""
    warnings = [messages.few_samples(recipe, valid_samples)]
    if any(phase.kind == "calibrate" for phase in recipe.phases):
        train_samples = distinct_samples(recipe.data.train, recipe.data.sequence_length)
        warnings.append(messages.repeated_samples(recipe, train_samples))
    for warning in filter(None, warnings):
        _print(warning)


def show_finished(recipe: Recipe) -> None:
    """For a run that has no step left."""
    folder, ratio = Path(recipe.checkpoint.directory) / "final", None
    with contextlib.suppress(CheckpointError):
        ratio = read_info(folder).compression_ratio
    _print(messages.finished(folder, recipe.total_steps, ratio, recipe.dmc.target_compression_ratio))


def _print(text: str) -> None:
    if dist.get_rank() == 0:
        # A log on a full disk must not stop the training.
        with contextlib.suppress(OSError):
            print(text, file=sys.stderr, flush=True)


def step_record(
    recipe: Recipe, step: int, plan: StepPlan, result: StepResult, learning_rate: float, seconds: float
) -> StepRecord:
    """The step's numbers as progress and monitor show them."""
    samples = step * recipe.training.global_batch_size
    loss = None
    if plan.target_compression_ratio is not None and result.merges and recipe.dmc.ratio_control == "loss":
        missing = merge_fraction_target(plan.target_compression_ratio) - result.merge_fraction(noisy=True)
        loss = recipe.dmc.loss_coefficient * max(0.0, missing)
    return StepRecord(
        step=step,
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
