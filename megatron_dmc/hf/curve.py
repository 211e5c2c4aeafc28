"""Which merge threshold gives a trained model which compression ratio, as it was measured on a text."""

import itertools
import math
from bisect import bisect_left
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

# A token merges where its decision logit is above it: what nobody's logit reaches.
MOST_THRESHOLD = 1e6


def check_threshold(name: str, value: Any) -> float:
    """Raises ValueError for anything but a finite number within +-MOST_THRESHOLD."""
    is_number = isinstance(value, int | float) and not isinstance(value, bool)
    # NaN is not within, either; an integer may be too large for a float.
    if not is_number or not -MOST_THRESHOLD <= value <= MOST_THRESHOLD:
        raise ValueError(f"{name} must be a number from -{MOST_THRESHOLD:g} to {MOST_THRESHOLD:g}, got {_shown(value)}")
    return float(value)


@dataclass(frozen=True)
class CompressionCurve:
    """Points that ``megatron-dmc ratios`` measured.

    Attributes:
        tokens: of each text that was read. A shorter one has a smaller ratio, because its window is a larger part of it.
        ratios: tokens per slot, ascending.
        thresholds: the merge threshold of each, in logits, descending.
    """

    tokens: int
    ratios: tuple[float, ...]
    thresholds: tuple[float, ...]

    def __post_init__(self) -> None:
        if type(self.tokens) is not int or self.tokens < 1:
            raise ValueError(f"compression_curve: tokens must be a whole number >= 1, got {self.tokens!r}")
        if len(self.ratios) != len(self.thresholds) or len(self.ratios) < 1:
            raise ValueError(
                f"compression_curve: ratios and thresholds must be as many, 1 at least, got {len(self.ratios)} and "
                f"{len(self.thresholds)}"
            )
        for value in self.thresholds:
            check_threshold("compression_curve: a threshold", value)
        for value in self.ratios:
            if check_threshold("compression_curve: a ratio", value) < 1:
                raise ValueError(f"compression_curve: a ratio must be >= 1, got {value!r}")
        if not _ascend(self.ratios) or not _ascend([-each for each in self.thresholds]):
            raise ValueError("compression_curve: ratios must ascend and thresholds descend; measure it again")

    @classmethod
    def from_dict(cls, values: Any) -> "CompressionCurve":
        """The inverse of :meth:`to_dict`, also after JSON; raises ValueError for what is none."""
        names = {"tokens", "ratios", "thresholds"}
        if not isinstance(values, Mapping) or set(values) != names:
            raise ValueError(f"compression_curve must have {', '.join(sorted(names))}, got {values!r:.200}")
        for name in ("ratios", "thresholds"):
            if not isinstance(values[name], list | tuple):
                raise ValueError(f"compression_curve: {name} must be a list, got {values[name]!r:.200}")
        return cls(values["tokens"], tuple(values["ratios"]), tuple(values["thresholds"]))

    def to_dict(self) -> dict[str, Any]:
        """Plain values, as written to ``config.json``."""
        return {"tokens": self.tokens, "ratios": list(self.ratios), "thresholds": list(self.thresholds)}

    def threshold(self, ratio: float) -> float:
        """The merge threshold at which texts of ``tokens`` tokens have this ratio: between two points, on the line in its
        logarithm.

        Raises:
            ValueError: no such ratio has been measured.
        """
        is_number = isinstance(ratio, int | float) and not isinstance(ratio, bool)
        if not is_number or not self.ratios[0] <= ratio <= self.ratios[-1]:
            raise ValueError(
                f"compression_ratio must be from {self.ratios[0]:.3g} to {self.ratios[-1]:.3g}, which were measured, got "
                f"{_shown(ratio)}"
            )
        after = bisect_left(self.ratios, ratio)
        if self.ratios[after] == ratio:
            return self.thresholds[after]
        part = math.log(ratio / self.ratios[after - 1]) / math.log(self.ratios[after] / self.ratios[after - 1])
        return self.thresholds[after - 1] + part * (self.thresholds[after] - self.thresholds[after - 1])


def _shown(value: Any) -> str:
    try:
        return repr(value)[:100]
    except ValueError:  # Python prints no integers of thousands of digits
        return "an integer of thousands of digits"


def _ascend(values: Sequence[float]) -> bool:
    return all(a < b for a, b in itertools.pairwise(values))
