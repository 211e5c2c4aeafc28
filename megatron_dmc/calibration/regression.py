"""Ridge regression of several targets on one set of features, from sums over tokens that several ranks have seen."""

from typing import NamedTuple

import torch
import torch.distributed as dist
from torch import Tensor

# Of the features' mean squares.
RIDGE = 1e-3


def summed(value: Tensor, group: dist.ProcessGroup | None) -> Tensor:
    """The sum over all ranks of a group (None: of all), as a tensor of its own."""
    whole = value.clone()
    dist.all_reduce(whole, group=group)
    return whole


class Sums(NamedTuple):
    """What a regression needs to know of the tokens, float64: their number, and sums of features, targets and products.

    Attributes:
        tokens: [1].
        features: [hidden].
        targets: [targets].
        products: of features and targets, [hidden, targets].
        gram: of features with one another, rows of [hidden, hidden]. 0.5 GB for 8192 features, so that every tensor-parallel
            rank sums its part of the rows.
    """

    tokens: Tensor
    features: Tensor
    targets: Tensor
    products: Tensor
    gram: Tensor

    @classmethod
    def empty(cls, hidden_size: int, targets: int, rows: int, device: torch.device) -> "Sums":
        sizes = (1,), (hidden_size,), (targets,), (hidden_size, targets), (rows, hidden_size)
        return cls(*(torch.zeros(size, dtype=torch.float64, device=device) for size in sizes))

    def add(self, features: Tensor, targets: Tensor, rows: slice) -> None:
        """[tokens, hidden] and [tokens, targets]; products in float64: those about the means are differences of these."""
        features, targets = features.double(), targets.double()
        self.tokens.add_(len(features))
        self.features.add_(features.sum(0))
        self.targets.add_(targets.sum(0))
        self.products.add_(features.T @ targets)
        self.gram.add_(features[:, rows].T @ features)

    def over(self, group: dist.ProcessGroup) -> "Sums":
        """The sums over all ranks of a group; each rank's own stay what they are."""
        return Sums(*(summed(value, group) for value in self))


def gram_rows(hidden_size: int, ranks: int) -> int:
    """Rows of the gram that each of so many tensor-parallel ranks sums."""
    return hidden_size // ranks if hidden_size % ranks == 0 else hidden_size


class Fit(NamedTuple):
    """A linear map of the features.

    Attributes:
        weight: float64 [hidden, targets].
        offset: float64 [targets].
        mean_square: of every feature, float64 [hidden].
    """

    weight: Tensor
    offset: Tensor
    mean_square: Tensor


def solve(sums: Sums, row_group: dist.ProcessGroup | None) -> Fit:
    """The weights that predict the targets best. The offset costs nothing.

    Args:
        sums: over all tokens.
        row_group: the ranks that hold the gram's rows; None: this one has them all.
    """
    gram = sums.gram
    if row_group is not None:
        parts = [torch.empty_like(gram) for _ in range(dist.get_world_size(row_group))]
        dist.all_gather(parts, gram, group=row_group)
        gram = torch.cat(parts)
    mean_square = gram.diagonal() / sums.tokens
    feature, target = sums.features / sums.tokens, sums.targets / sums.tokens
    # Per token, and about the means: the offset is what is left.
    products = sums.products / sums.tokens - feature[:, None] * target
    matrix = gram / sums.tokens - feature[:, None] * feature
    # A feature that is always 0 learns nothing.
    matrix.diagonal().add_(RIDGE * mean_square + torch.finfo(torch.float32).tiny)
    weight = torch.linalg.solve(matrix, products)
    return Fit(weight, target - feature @ weight, mean_square)
