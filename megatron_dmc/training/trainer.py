"""Runs a recipe: pretraining or the phases of a retrofit, on megatron-core's own parts."""

import math
import time
from functools import partial
from typing import Any

from megatron.core import parallel_state

from megatron_dmc.calibration import DAMAGED, Calibrator
from megatron_dmc.checkpoint import SavedModel
from megatron_dmc.checkpoint.agreement import from_first_rank
from megatron_dmc.config import ConfigError
from megatron_dmc.data import Repeats, SampleDataset, build_datasets, check_reach, distinct_samples
from megatron_dmc.data.tokenizer import check_vocabulary, load_tokenizer
from megatron_dmc.distributed.world import seed_weights
from megatron_dmc.errors import DMCError
from megatron_dmc.files import CHECKPOINT_MARK
from megatron_dmc.recipe import Recipe, check_batch
from megatron_dmc.training.build import check_machine
from megatron_dmc.training.monitor import StepRecord
from megatron_dmc.training.optimizer import phase_scheduler, restart_optimizer
from megatron_dmc.training.report import Report, show_few_samples, show_finished, show_start, step_record
from megatron_dmc.training.run_state import RunStore, check_outputs
from megatron_dmc.training.schedule import StepPlan, integer_ratios, plan_step, repeat_fraction
from megatron_dmc.training.signals import StopRequest
from megatron_dmc.training.step import StepResult, StepRunner

# Logits. Bfloat16 has steps of 1/16 beside it: a fiftieth of what one unit of a calibrated score is worth.
MOST_CALIBRATED_BIAS = 16.0
# Learning rate. Rates in logits, for decisions after calibrate, are above it.
MOST_RATE_OF_A_BASE = 0.1


class TrainingError(DMCError, RuntimeError):
    """A run that cannot go on. The message says why and what to do."""


class Trainer(StepRunner):
    """One run of a recipe on this process's share of the model. torch.distributed must be initialized.

    Attributes:
        stopped: whether ``run`` ended early because a rank was asked to; the run is saved and can go on.
    """

    def __init__(self, recipe: Recipe, stop_request: StopRequest | None = None) -> None:
        self.stop_request = stop_request or StopRequest()
        self.stopped = False
        check_machine(recipe)
        check_outputs(recipe)
        start, teacher = _open_checkpoints(recipe)
        train_data, valid_data, self._valid_samples = _checked_data(recipe)
        seed_weights(recipe.training.seed)
        super().__init__(recipe, train_data, valid_data, teacher, lambda: self.stop_request.received is not None)
        self.store = RunStore(recipe, self.model, self.optimizer, start)
        self._due = integer_ratios(recipe.phases, recipe.dmc) if recipe.checkpoint.save_every_integer_ratio else {}
        self._scheduler: Any = None
        self._calibrator: Calibrator | None = None

    def run(self) -> StepResult | None:
        """Trains to the end of the recipe (or ``training.exit_after_steps``); resumes from ``latest`` if there is one.

        A request to stop takes effect at the end of a step: a full checkpoint is saved, and ``stopped`` is set.

        Returns:
            The last evaluation on held-out samples, or None without held-out data or without a step left to do.

        Raises:
            CheckpointError: another run writes into ``checkpoint.directory``, or what is there does not go on.
            TrainingError, CalibrationError: see there.
        """
        recipe = self.recipe
        self._calibrator = None
        self.step, self.merge_fraction, self.multiplier = self.store.load(self._unfinished_calibrator)
        self._scheduler = None
        if self.step >= recipe.total_steps:
            self._save_final_again()
            show_finished(recipe)
            return None
        last_step = recipe.total_steps
        if recipe.training.exit_after_steps is not None:
            last_step = min(last_step, self.step + recipe.training.exit_after_steps)
        _check_calibrated_bias(recipe, plan_step(recipe.phases, recipe.dmc, self.step).phase_index)
        show_start(recipe, self.model, self.store, self.step)
        show_few_samples(recipe, self._valid_samples)
        evaluation: StepResult | None = None
        with self.store.claimed(), Report(recipe, self.store, self.step) as report, self.store:
            if self.step == 0:
                _check_base(
                    self._evaluate_and_report(plan_step(recipe.phases, recipe.dmc, 0), report), "held-out samples"
                )
            while self.step < last_step and not self.stopped:
                self.store.poll()
                report.saved()
                plan = plan_step(recipe.phases, recipe.dmc, self.step)
                result = self._advance(plan, report)
                done = self.step == recipe.total_steps
                due = _is_due(self.step, recipe.monitor.eval_interval) or plan.ends_calibration
                # A stop waits for no evaluation: what asked for it may allow a run only seconds to save.
                if done or (not result.stop and due):
                    evaluation = self._evaluate_and_report(plan, report)
                    result.stop |= evaluation is not None and evaluation.stop
                self._save(plan, result, last_step, report)
            self.store.wait()
            report.saved()
            report.below_targets()
            if self.stopped:
                report.stopped(self.step)
            if self.step == recipe.total_steps:
                report.ended(evaluation, result)
        return evaluation

    def _save_final_again(self) -> None:
        """Of a finished run, the result that somebody has removed."""
        final = self.store.root / "final"
        # What rank 0 sees: another node may still see the folder as it was before.
        if from_first_rank(not (final / CHECKPOINT_MARK).exists()):
            ratio = 1 / (1 - self.merge_fraction) if self.recipe.merges else None
            with self.store.claimed(), self.store:
                self.store.save_weights("final", self.step, len(self.recipe.phases) - 1, ratio)

    def _evaluate_and_report(self, plan: StepPlan, report: Report) -> StepResult | None:
        result = self.evaluate(plan)
        if result is not None and result.recall_loss is not None:
            if self.store.base_recall_loss is None and self._is_base_without_decisions():
                self.store.base_recall_loss = self.measure_base_recall()
            result.base_recall_loss = self.store.base_recall_loss
        report.evaluation(result, self.step, plan.phase_index)
        return result

    def _is_base_without_decisions(self) -> bool:
        """Whether this model is its base as long as nothing merges."""
        start = self.store.start
        return self.recipe.trains_adapter or (
            self.step == 0 and (start is None or start.is_adapter or not start.merges)
        )

    def _advance(self, plan: StepPlan, report: Report) -> StepResult:
        """One step of training, its schedule, and what it says of itself."""
        if plan.phase.kind == "calibrate":
            return self._calibrate(plan, report)
        if plan.step_in_phase == 0:
            restart_optimizer(self.optimizer)
        if plan.step_in_phase == 0 or self._scheduler is None:
            weight_decay = self.recipe.training.weight_decay
            self._scheduler = phase_scheduler(self.optimizer, plan.phase, weight_decay, plan.step_in_phase)
        began = time.perf_counter()
        learning_rate = self.optimizer.param_groups[0]["lr"]
        result = self._train_step(plan)
        self._check_finite(plan, result)
        self._scheduler.step(increment=1)
        self.step += 1
        if result.merges:
            self.merge_fraction = result.merge_fraction(noisy=False)
        if plan.is_last_in_phase and plan.phase.kind == "zero_out":
            self._clear_decision_channel()
        report.step(self._record(plan, result, learning_rate, time.perf_counter() - began))
        return result

    def _calibrate(self, plan: StepPlan, report: Report) -> StepResult:
        """One global batch that the base reads, and at the phase's end decisions in place of training."""
        calibrator = self._calibrator = self._calibrator or self._new_calibrator(plan)
        began = time.perf_counter()
        with calibrator.observing(plan.step_in_phase):
            result = self._forward_step()
        _check_base(result, f"the samples of step {self.step + 1}")
        self.step += 1
        report.step(self._record(plan, result, 0.0, time.perf_counter() - began))
        found = calibrator.finish_step(plan.step_in_phase)
        if found is not None:
            self._calibrator = None
            self.merge_fraction = found.merge_fraction
            self.optimizer.reload_model_params()
            report.calibration(found, self.step)
        return result

    def _new_calibrator(self, plan: StepPlan) -> Calibrator:
        ratio = self.recipe.start_ratio(plan.phase_index)
        return Calibrator(self.recipe, plan.phase, ratio, self.model, step=plan.step_in_phase)

    def _unfinished_calibrator(self, step: int) -> Calibrator | None:
        """What a run goes on with that is resumed in the middle of a ``calibrate`` phase."""
        if step < self.recipe.total_steps:
            plan = plan_step(self.recipe.phases, self.recipe.dmc, step)
            if plan.phase.kind == "calibrate" and plan.step_in_phase > 0:
                self._calibrator = self._new_calibrator(plan)
        return self._calibrator

    def _check_finite(self, plan: StepPlan, result: StepResult) -> None:
        finite = math.isfinite(result.loss) or not result.tokens
        if not (finite and math.isfinite(result.grad_norm) and result.updated):
            raise TrainingError(
                f"step {self.step + 1} has loss {result.loss} and gradient norm {result.grad_norm}: training diverged; lower "
                f"phases[{plan.phase_index}].lr and resume from the last checkpoint"
            )

    def _save(self, plan: StepPlan, result: StepResult, last_step: int, report: Report) -> None:
        """The checkpoints that are due after a step; notes a request to stop."""
        recipe, ratio = self.recipe, result.ratio(noisy=False)
        if plan.ends_calibration:
            ratio = 1 / (1 - self.merge_fraction)
        done = self.step == recipe.total_steps
        for target, step in self._due.items():
            if step == self.step:
                self.store.save_weights(f"cr_{target}", self.step, plan.phase_index, ratio)
        if done:
            self.store.save_weights("final", self.step, plan.phase_index, ratio)
        self.stopped = result.stop and not done
        if self.step == last_step or self.stopped or _is_due(self.step, recipe.checkpoint.save_interval):
            # First: a resumed run writes no point before its checkpoint again.
            report.flush()
            self.store.save_full(
                self.step, plan.phase_index, ratio, self.merge_fraction, self.multiplier, self._calibrator
            )
        report.saved()

    def _record(self, plan: StepPlan, result: StepResult, learning_rate: float, seconds: float) -> StepRecord:
        return step_record(self.recipe, self.step, plan, result, learning_rate, seconds)


def _open_checkpoints(recipe: Recipe) -> tuple[SavedModel | None, SavedModel | None]:
    """What the run starts from, and what teaches it, as far as the recipe names them; both must fit it."""
    start = teacher = None
    load_base = recipe.checkpoint.load_base
    if load_base is not None:
        start = SavedModel.open(load_base)
        start.check_fits(recipe)
        if start.is_calibrating:
            raise ConfigError(
                f"{load_base} was saved in the middle of a calibration, its decisions are not made yet; resume that run, or "
                "name its base in checkpoint.load_base"
            )
        if start.merges and any(phase.kind == "calibrate" for phase in recipe.phases):
            raise ConfigError(
                f"{load_base} is a retrofitted model, and calibrate would replace its decisions; name its base in "
                "checkpoint.load_base, or remove the phase"
            )
    if recipe.merges and recipe.dmc.ratio_control == "offset":
        _check_offset(recipe, start)
    if recipe.teacher is not None:
        teacher = start if recipe.teacher == load_base and start is not None else SavedModel.open(recipe.teacher)
        teacher.check_teaches(recipe)
    return start, teacher


def _check_offset(recipe: Recipe, start: SavedModel | None) -> None:
    """An offset is for decisions that differ, and the recipes that have one train them at rates that would destroy a base."""
    if (start is None or not start.merges) and recipe.phases[0].kind != "calibrate":
        raise ConfigError(
            "dmc.ratio_control offset would switch the decisions of an untrained projection all at once; put a phase "
            "{kind: calibrate, steps: 32} first, name a retrofit in checkpoint.load_base, or set dmc.ratio_control: loss"
        )
    for i, phase in enumerate(recipe.phases):
        if phase.lr > MOST_RATE_OF_A_BASE and phase.kind != "calibrate" and not recipe.trains_adapter:
            raise ConfigError(
                f"phases[{i}].lr {phase.lr:g} is a rate for decisions alone, and training.train {recipe.training.train} would "
                f"move all weights with it; set phases.{i}.lr (1e-5 to 1e-4 for a large model), its min_lr, and "
                "dmc.decision_scale to what the decisions' rate is to be over it"
            )


def _check_calibrated_bias(recipe: Recipe, phase: int) -> None:
    """Not a check of recipes: what was trained in float32 with such a one goes on, and is exported."""
    for i, each in enumerate(recipe.phases):
        if i >= phase and each.kind == "calibrate" and recipe.dmc.decision_bias > MOST_CALIBRATED_BIAS:
            raise ConfigError(
                f"phases[{i}].kind calibrate takes a dmc.decision_bias of at most {MOST_CALIBRATED_BIAS:g}, got "
                f"{recipe.dmc.decision_bias:g}: what it finds is kept beside it, in bfloat16"
            )


def _checked_data(recipe: Recipe) -> tuple[SampleDataset, SampleDataset | None, int]:
    """The run's training and held-out samples, after all checks that need no model, and how many held-out ones differ."""
    tokenizer = load_tokenizer(recipe.data.tokenizer, "data.tokenizer")
    remedy = f"set model.vocab_size to at least {tokenizer.vocab_size}, or name the model's tokenizer"
    check_vocabulary(tokenizer, recipe.model.vocab_size, remedy)
    check_batch(recipe, parallel_state.get_data_parallel_world_size())
    check_reach(recipe)
    size = recipe.training.global_batch_size
    distinct = distinct_samples(recipe.data.valid, recipe.data.sequence_length)
    held_out = max(min(recipe.monitor.eval_samples, distinct), size) if recipe.data.valid else 0
    train, valid = build_datasets(recipe.data, tokenizer, recipe.total_steps * size, held_out)
    fractions = partial(repeat_fraction, recipe.phases, recipe.repeat_fraction)
    return Repeats(train, lambda number: fractions(number // size)), valid, distinct


def _check_base(result: StepResult | None, where: str) -> None:
    """Raises TrainingError, on all ranks, if a model that has not been trained yet gives no number."""
    if result is not None and result.tokens and not math.isfinite(result.loss):
        raise TrainingError(f"the loss on {where} is {result.loss} before any training; {DAMAGED}")


def _is_due(step: int, interval: int) -> bool:
    return interval > 0 and step % interval == 0
