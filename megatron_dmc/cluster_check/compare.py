"""A layout's steps against those of one process."""

import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

# Largest relative difference of a step's loss, by precision; and how often a decision may come out differently, as a part
# of all: its logit lies within rounding of 0. FP8's are 16 times bf16's, as its last digit is, and were seen nowhere yet.
TOLERANCES = {"fp32": 2e-5, "bf16": 1e-2, "fp8": 0.16}
FLIPS = {"fp32": 1e-3, "bf16": 1e-2, "fp8": 0.16}

# These are computed from relaxed decisions, so a logit that crosses 0 hardly changes them.
CONTINUOUS = ("lm_loss", "distillation_loss", "gradient_norm")
# These are counts of hard decisions: the same unless one has flipped.
COUNTED = ("compression_loss", "compression_ratio", "noisy_compression_ratio")

Step = dict[str, Any]


@dataclass(frozen=True)
class Difference:
    """The worst of all steps.

    Attributes:
        relative: largest relative difference of a loss, ratio or gradient norm.
        quantity: which one that was.
        step: when, from 1.
        flips: decisions that came out differently, with noise and without, summed over the steps.
        decisions: how many were made.
        allowed: whether all of it lies within the tolerance.
    """

    relative: float
    quantity: str
    step: int
    flips: int
    decisions: int
    allowed: bool


def compare(steps: Sequence[Step], reference: Sequence[Step], precision: str) -> Difference:
    """Where a decision flipped, counts (and what is made of them) may differ by that; nothing else may."""
    worst, where, flips, decisions = 0.0, ("lm_loss", 1), 0, 0
    for number, (step, expected) in enumerate(zip(steps, reference, strict=True), start=1):
        flipped = _flips(step["counts"], expected["counts"])
        flips += flipped
        decisions += 2 * sum(map(sum, expected["counts"][2]))
        for quantity in CONTINUOUS if flipped else (*CONTINUOUS, *COUNTED):
            difference = _relative(step[quantity], expected[quantity])
            if not difference <= worst:
                worst, where = difference, (quantity, number)
    allowed = worst <= TOLERANCES[precision] and flips <= FLIPS[precision] * decisions
    return Difference(worst, *where, flips, decisions, allowed)


def _flips(counts: Any, expected: Any) -> int:
    """Differences of the counts [3, layers, kv_heads]; the last is the number of tokens, which must be the same."""
    pairs = [
        [(x, y) for row, other in zip(kind, others, strict=True) for x, y in zip(row, other, strict=True)]
        for kind, others in zip(counts, expected, strict=True)
    ]
    if any(x != y for x, y in pairs[2]):
        raise ValueError("another number of tokens was counted")
    return sum(abs(x - y) for kind in pairs[:2] for x, y in kind)


def _relative(value: float | None, expected: float | None) -> float:
    """Infinite for what is not a number or is there on one side only."""
    if value is None or expected is None:
        return 0.0 if value is expected else math.inf
    if value == expected:
        return 0.0
    difference = abs(value - expected) / max(abs(expected), 1e-30)
    return difference if math.isfinite(difference) else math.inf
