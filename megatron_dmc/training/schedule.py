"""What every step of a retrofit does: its phase, its target and its scales, as pure functions of the step's number."""

import itertools
from collections.abc import Sequence
from dataclasses import dataclass

from megatron_dmc.config import DMCConfig
from megatron_dmc.recipe import PhaseConfig

# zero_out fades the channel over the first part of its steps and trains on with the channel at zero (paper, section 4).
FADE_FRACTION = 0.8
# Of the samples that calibrate learns from.
CALIBRATION_REPEATS = 0.5


@dataclass(frozen=True)
class StepPlan:
    """One step of the run.

    Attributes:
        phase_index, phase: where in the recipe's phases.
        step_in_phase: steps of this phase done before this one.
        merging: whether decisions are made.
        target_compression_ratio: CR* of this step; None where nothing merges.
        channel_scale: factor on the last channel of q and k.
    """

    phase_index: int
    phase: PhaseConfig
    step_in_phase: int
    merging: bool
    target_compression_ratio: float | None
    channel_scale: float

    @property
    def is_last_in_phase(self) -> bool:
        return self.step_in_phase + 1 == self.phase.steps

    @property
    def ends_calibration(self) -> bool:
        """Whether a ``calibrate`` phase is done with the step."""
        return self.phase.kind == "calibrate" and self.is_last_in_phase

    @property
    def has_decided(self) -> bool:
        """Whether decisions mean something once the step is done: while ``calibrate`` goes on they do not yet."""
        return self.merging or self.ends_calibration


def plan_step(phases: Sequence[PhaseConfig], dmc: DMCConfig, step: int) -> StepPlan:
    """The plan of the step after ``step`` steps of the run; raises IndexError when the run is over."""
    index, step = _phase_of(phases, step)
    phase = phases[index]
    merging = phase.merges
    scale = max(0.0, 1 - step / (FADE_FRACTION * phase.steps)) if phase.kind == "zero_out" else 1.0
    return StepPlan(index, phase, step, merging, _target(phase, dmc, step) if merging else None, scale)


def _phase_of(phases: Sequence[PhaseConfig], step: int) -> tuple[int, int]:
    """Which phase a step of the run belongs to, and how many steps of that phase come before it."""
    index = 0
    while step >= phases[index].steps:
        step -= phases[index].steps
        index += 1
    return index, step


def _target(phase: PhaseConfig, dmc: DMCConfig, step: int) -> float:
    goal = dmc.target_compression_ratio
    if phase.kind == "solidify":
        return goal
    start = phase.start_compression_ratio
    # The last step of the phase has reached the goal.
    return start + (goal - start) * min(1.0, (step + 1) / phase.steps)


def repeat_fraction(phases: Sequence[PhaseConfig], elsewhere: float, step: int) -> float:
    """How many samples of a step are a text twice.

    ``calibrate`` learns from as many repeats as not, because they show what copying asks for; it chooses its threshold on
    text as it is.

    Args:
        elsewhere: in the phases that train.
    """
    try:
        phase, done = _phase_of(phases, step)
    except IndexError:  # a dataset may be longer than its run
        return elsewhere
    if phases[phase].kind != "calibrate":
        return elsewhere
    return CALIBRATION_REPEATS if done < phases[phase].fit_steps else 0.0


def integer_ratios(phases: Sequence[PhaseConfig], dmc: DMCConfig) -> dict[int, int]:
    """{integer CR: steps of the run after which its checkpoint is due}, from the targets of the compress phases."""
    due: dict[int, int] = {}
    begin = 0
    for phase in phases:
        if phase.kind == "compress":
            for ratio in itertools.count(int(phase.start_compression_ratio) + 1):
                if ratio > dmc.target_compression_ratio:
                    break
                share = (ratio - phase.start_compression_ratio) / (
                    dmc.target_compression_ratio - phase.start_compression_ratio
                )
                due.setdefault(ratio, begin + max(1, round(share * phase.steps)))
        begin += phase.steps
    return due
