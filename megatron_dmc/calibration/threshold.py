"""One quantile of predictions that no rank holds together."""

import torch
from torch import Tensor

# Logarithms of shares of attention, times norms: none lies outside.
LEAST, MOST, PER_UNIT = -64, 64, 1024


class Histogram:
    """Counts predictions in bins of 1 / 1024.

    Attributes:
        counts: int64 [bins]; may be summed over ranks.
    """

    def __init__(self, device: torch.device) -> None:
        self.counts = torch.zeros((MOST - LEAST) * PER_UNIT, dtype=torch.int64, device=device)

    def add(self, values: Tensor) -> None:
        # A prediction that is not a number has an error that is none either, by which the calibration is refused.
        bins = ((values.flatten().nan_to_num(LEAST) - LEAST) * PER_UNIT).clamp(0, len(self.counts) - 1).long()
        self.counts += torch.bincount(bins, minlength=len(self.counts))


def quantile(counts: Tensor, share: float) -> float:
    """The value below which ``share`` of what a histogram counted lies; within a bin it is taken to be spread evenly."""
    below = counts.cumsum(0).double()
    wanted = share * below[-1]
    bin_ = int(torch.searchsorted(below, wanted).clamp(max=len(counts) - 1))
    inside = float((wanted - (below[bin_ - 1] if bin_ else 0)) / counts[bin_].clamp(min=1))
    return LEAST + (bin_ + inside) / PER_UNIT
