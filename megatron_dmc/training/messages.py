"""What a run tells its reader in words: what it is, where it starts, what it saved, and how it ended."""

import math
from collections.abc import Iterable, Sequence
from dataclasses import dataclass, fields
from fractions import Fraction
from pathlib import Path
from typing import Any

from megatron_dmc import __version__
from megatron_dmc.calibration import CalibrationResult
from megatron_dmc.checkpoint.agreement import size_text
from megatron_dmc.recipe import Recipe
from megatron_dmc.training.progress import short_number
from megatron_dmc.training.run_state import SavedCheckpoint
from megatron_dmc.training.schedule import CALIBRATION_REPEATS
from megatron_dmc.training.step import StepResult

# A ratio below this share of its target misses it; where something holds it there, one above that share does, too.
REACHED, EXCEEDED = 0.95, 1.1
# Nobody is told to have a larger fraction of the samples repeated: a model must still see text that does not repeat.
MOST_REPEATS = 0.5


@dataclass(frozen=True)
class World:
    """What a run runs on: processes, replicas of the model, and the GPU of each process; None: the CPU."""

    processes: int
    replicas: int
    gpu: str | None


def banner(
    recipe: Recipe, world: World, parameters: int, training_parameters: int, vocabulary: str | None = None
) -> str:
    """What is about to run, one line per topic.

    Args:
        parameters: of the whole model, and how many of them train.
        vocabulary: what ``recipe.base.vocabulary_line`` says.
    """
    model, data, checkpoint, monitor = recipe.model, recipe.data, recipe.checkpoint, recipe.monitor
    trained = "all" if training_parameters == parameters else f"{training_parameters:,}"
    every = f"every {checkpoint.save_interval} steps" if checkpoint.save_interval else "at the end"
    unused = recipe.distillation.teacher is not None and not recipe.distills
    topics = [
        ("model", f"{model.num_layers} layers, {model.num_query_groups} KV heads, {parameters:,} parameters"),
        *([("vocabulary", vocabulary)] if vocabulary else []),
        ("trains", f"{trained} of them, {_precision(recipe)}"),
        *([("teacher", "none: distillation.weight is 0, so distillation.teacher is not used")] if unused else []),
        ("layout", _layout(recipe, world)),
        *(("phase", line) for line in _phases(recipe)),
        ("data", ", ".join(data.train) + _repeats(recipe)),
        ("held out", ", ".join(data.valid) or "nothing"),
        ("checkpoints", f"{checkpoint.directory}, {every}"),
        ("TensorBoard", monitor.tensorboard or "none"),
    ]
    return "\n".join([_title(recipe), *(f"  {name:11}  {value}" for name, value in topics)])


def _title(recipe: Recipe) -> str:
    dmc = recipe.dmc
    if not recipe.merges:
        return f"megatron-dmc {__version__}: pretraining"
    kind = "adapter" if recipe.trains_adapter else "retrofit"
    window = f", local window {dmc.local_window}" if dmc.local_window else ""
    return f"megatron-dmc {__version__}: {kind} to CR {dmc.target_compression_ratio:g}, {dmc.operation}{window}"


def _precision(recipe: Recipe) -> str:
    training = recipe.training
    return ("bfloat16" if training.bf16 else "float32") + (f" with FP8 {training.fp8}" if training.fp8 else "")


def _layout(recipe: Recipe, world: World) -> str:
    parallel = recipe.parallel
    sizes = {
        "TP": parallel.tensor_model_parallel_size,
        "PP": parallel.pipeline_model_parallel_size,
        "CP": parallel.context_parallel_size,
        "DP": world.replicas,
    }
    many = "process" if world.processes == 1 else "processes"
    devices = f"{world.processes} CPU {many}" if world.gpu is None else f"{world.processes} x {world.gpu}"
    return " x ".join(f"{name} {size}" for name, size in sizes.items()) + f" on {devices}"


def _phases(recipe: Recipe) -> list[str]:
    per_step = recipe.training.global_batch_size * recipe.data.sequence_length
    goal = recipe.dmc.target_compression_ratio
    lines = []
    for i, phase in enumerate(recipe.phases):
        aim = f", CR {phase.start_compression_ratio:g} to {goal:g}" if phase.kind == "compress" else ""
        aim = f", CR {recipe.start_ratio(i):g}" if phase.kind == "calibrate" else aim
        lines.append(f"{phase.kind}, {phase.steps} steps, {short_number(phase.steps * per_step)} tokens{aim}")
    return lines


def _repeats(recipe: Recipe) -> str:
    fraction = CALIBRATION_REPEATS if _only_calibrates(recipe) else recipe.repeat_fraction
    if not fraction:
        return ""
    simple = Fraction(fraction).limit_denominator(12)
    share = str(simple) if math.isclose(simple, fraction, rel_tol=1e-9) else f"{fraction:g}"
    return f", {'all' if fraction == 1 else share} of the samples a text twice"


def started(folder: Path | None, step: int) -> str:
    """Where a run begins: with a checkpoint of its own, with a base, or with initial weights."""
    if folder is None:
        return "starting from initial weights"
    return f"resuming from step {step} of {folder}" if step else f"starting from {folder}"


def is_below(checkpoint: SavedCheckpoint, target: float | None) -> bool:
    """Whether a checkpoint that is kept for its ratio has a lower one."""
    ratio = checkpoint.info.compression_ratio
    return ratio is not None and target is not None and ratio < REACHED * target


def saved(checkpoint: SavedCheckpoint, target: float | None = None) -> str:
    """Args: target: that the line is to name, of a checkpoint that is below it."""
    ratio = checkpoint.info.compression_ratio
    reached = "" if ratio is None else f": CR {ratio:.2f}"
    if target is not None:
        reached += f", below its target {target:g}"
    return f"saved {checkpoint.name}{reached} ({size_text(checkpoint.size)}, {checkpoint.seconds:.1f} s)"


def few_samples(recipe: Recipe, valid_samples: int) -> str | None:
    """A warning where an evaluation reads fewer samples than ``monitor.eval_samples``, or some again; None where all is well.

    Args:
        valid_samples: how many different ones ``data.valid`` has.
    """
    wanted, batch = recipe.monitor.eval_samples, recipe.training.global_batch_size
    if not recipe.data.valid or valid_samples >= max(wanted, batch):
        return None
    there = f"warning: data.valid has {valid_samples} samples of {recipe.data.sequence_length} tokens"
    if valid_samples < batch:
        again = f"an evaluation reads {batch}, some of them more than once; hold out more text"
        return f"{there}, fewer than a global batch: {again}"
    read = valid_samples // batch * batch
    return f"{there}: an evaluation reads {read}, each once, in place of {wanted} (monitor.eval_samples)"


def repeated_samples(recipe: Recipe, train_samples: int) -> str | None:
    """A warning where ``calibrate`` measures on text that it may have learned from; None where all is well.

    megatron-core shuffles all passes over the text together, so that what counts is how often the whole run reads it.

    Args:
        train_samples: how many different ones ``data.train`` has.
    """
    read = recipe.total_steps * recipe.training.global_batch_size
    if read <= train_samples:
        return None
    return (
        f"warning: data.train has {train_samples} samples of {recipe.data.sequence_length} tokens, the run reads {read}: a "
        "part of the text that calibrate measures on (R², the threshold) it has learned from; use more text"
    )


def without_effect(recipe: Recipe) -> str | None:
    """A warning of settings that somebody has set and that mean nothing beside the others; None where all do."""
    found: list[str] = []

    def add(section: str, settings: Any, names: Iterable[str], beside: str) -> None:
        for field in fields(settings):
            if field.name in names and getattr(settings, field.name) != field.default:
                found.append(f"{section}.{field.name} with {beside}")

    dmc = recipe.dmc
    if not dmc.merges:
        add("dmc", dmc, ["omega_floor"], f"dmc.operation {dmc.operation}")
    if dmc.ratio_control == "offset":
        add("dmc", dmc, ["loss_coefficient"], "dmc.ratio_control offset")
    for number, phase in enumerate(recipe.phases):
        if phase.kind == "calibrate":
            others = {field.name for field in fields(phase)} - {"kind", "steps"}
            add(f"phases[{number}]", phase, others, "kind calibrate")
    if _only_calibrates(recipe):
        nothing_learns = "phases of kind calibrate alone"
        add("dmc", dmc, ["temperature"], nothing_learns)
        add("distillation", recipe.distillation, ["weight"], nothing_learns)
        add("data", recipe.data, ["repeat_fraction"], nothing_learns)
    return f"warning: without effect: {', '.join(found)}" if found else None


def _only_calibrates(recipe: Recipe) -> bool:
    return all(phase.kind == "calibrate" for phase in recipe.phases)


def below_targets(names: Sequence[str]) -> str:
    """Which checkpoints were saved below their targets; there are several."""
    return f"{len(names)} checkpoints were saved below their targets: {', '.join(names)}"


def held_out(result: StepResult, step: int) -> str:
    """An evaluation after so many steps."""
    ratio, recall, gap = result.ratio(noisy=False), result.recall_loss, result.recall_gap
    merged = "" if ratio is None else f", compression ratio {ratio:.2f}"
    copied = "" if recall is None else f", recall {recall:.2f}"
    over = "" if gap is None else f" ({gap:+.2f} over the base)"
    return f"held-out loss after {step} steps: {result.loss:.4f} nats per token{merged}{copied}{over}"


def recall_behind(recipe: Recipe, gap: float | None) -> str | None:
    """A warning where copying costs too much more than it costs the base; None where all is well.

    Args:
        gap: ``StepResult.recall_gap``.
    """
    limit = recipe.monitor.recall_limit
    # What is not finite is an error of its own.
    if gap is None or limit is None or not limit < gap < math.inf:
        return None
    may_repeat = recipe.repeat_fraction < MOST_REPEATS and not _only_calibrates(recipe)
    repeats = ["a larger data.repeat_fraction"] if may_repeat else []
    remedies = ", ".join(["more steps", *repeats, "a larger dmc.local_window"])
    return (
        f"warning: recall falls behind: {gap:.2f} nats per token above the base on repeated text (limit {limit:g}, "
        f"monitor.recall_limit); try {remedies}, or a lower dmc.target_compression_ratio"
    )


def calibration(result: CalibrationResult) -> str:
    """What ``calibrate`` found."""
    r2 = result.r2
    ratio = 1 / (1 - result.merge_fraction)
    return (
        f"calibrated on {short_number(result.tokens)} tokens: predicts {float(r2.mean()):.2f} of the variance (R²) of later "
        f"attention on other text (layers {float(r2.min()):.2f} to {float(r2.max()):.2f}); compression ratio {ratio:.2f}"
    )


def useless_calibration(result: CalibrationResult) -> str | None:
    """A warning where a constant would have predicted as well; None where all is well."""
    if float(result.r2.mean()) > 0:
        return None
    return (
        "warning: this calibration predicts nothing on other text, its decisions are no better than chance; try more steps, "
        "or text like that which the model is for"
    )


def stopped(step: int) -> str:
    return f"asked to stop: saved after step {step}; the same command goes on from there"


def finished(folder: Path, steps: int, ratio: float | None, target: float | None) -> str:
    """For a run that has nothing left to do."""
    result = "" if ratio is None else f", CR {ratio:.2f} (target {target:g})"
    return (
        f"this run is finished: all {steps} steps are done{result}; its result is {folder}\n"
        f"  to look at it: megatron-dmc inspect {folder}\n"
        f"  to train on: a new checkpoint.directory with checkpoint.load_base={folder}"
    )


def missed_target(recipe: Recipe, held_out_ratio: float | None, training_ratio: float | None) -> str | None:
    """A warning where a run's last phase was to reach the target and did not, or went beyond it; None where all is well.

    Args:
        held_out_ratio: noise-free, on held-out samples; None without any.
        training_ratio: noise-free, of the last global batch.
    """
    target = recipe.dmc.target_compression_ratio
    ratio, where = held_out_ratio, "held-out samples"
    if ratio is None:
        ratio, where = training_ratio, "the last training batch"
    last = recipe.phases[-1]
    if not last.decides or ratio is None:
        return None
    # The loss is one-sided: a model may merge more of its own accord.
    is_held = last.kind == "calibrate" or recipe.dmc.ratio_control == "offset"
    low, high = REACHED * target, EXCEEDED * target if is_held else math.inf
    if low <= ratio <= high:
        return None
    missed = "missed" if ratio < low else "exceeded"
    if training_ratio is not None and low <= training_ratio <= high:
        other = "higher" if ratio < low else "lower"
        advice = f"training reached {training_ratio:.2f}: try more varied text, more steps, or a {other} target"
    elif last.kind == "calibrate":
        advice = "try more steps, or text like that which it is measured on"
    elif recipe.dmc.ratio_control == "offset":
        advice = "try more steps, a lower learning rate, or a larger training.global_batch_size"
    elif recipe.trains_adapter:
        # It has nothing but its decisions to learn, so its learning rate decides how fast they change.
        advice = "try a higher learning rate, a larger dmc.loss_coefficient, or more steps"
    else:
        advice = "try a larger dmc.loss_coefficient, a higher learning rate, or more steps"
    return f"warning: target {missed}: CR {ratio:.2f} on {where}, target {target:g}; {advice}"
