"""Samples that are a text twice: what copying from the context is trained on, and measured on."""

import math
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

from megatron_dmc.data.samples import SampleDataset


def text_twice(sample: dict[str, Any]) -> tuple[dict[str, Any], Tensor]:
    """The first half of a sample's documents, each of them twice.

    A document of n tokens becomes one document of 2 n, whose positions run on through both copies. Without
    ``document_starts`` the whole half is one document. The half is rounded up, and of the last copy as much is taken as the
    sample has room for. The first token of a second copy does not count in the loss: nothing says that the text begins again.

    Args:
        sample: as :func:`~megatron_dmc.data.packing.packed_sample` makes it, of s tokens. Other entries stay as they are.

    Returns:
        (a sample with the same entries, bool [s]: whether a token's LABEL lies in a second copy and could be read in the
        first: all but a copy's first token. Labels that do not count in the loss are among them).
    """
    tokens, starts = sample["tokens"], sample.get("document_starts")
    size = len(tokens)
    half = (size + 1) // 2
    first = torch.zeros(half, dtype=torch.bool)
    if starts is not None:
        first |= starts[:half]
    first[0] = True
    begins = first.nonzero().flatten()
    lengths = torch.diff(begins, append=torch.tensor([half]))
    # Of every new token: its document, its place there, and the tokens of one copy.
    document = torch.repeat_interleave(2 * lengths)[:size]
    place = torch.arange(size) - 2 * begins[document]
    length = lengths[document]
    source = begins[document] + place % length
    junction = place == length - 1
    twice = {
        **sample,
        "tokens": tokens[source],
        "labels": torch.where(junction, tokens[begins[document]], sample["labels"][source]),
        "loss_mask": sample["loss_mask"][source].masked_fill(junction, 0.0),
        "position_ids": place,
    }
    if starts is not None:
        twice["document_starts"] = place == 0
    return twice, (place >= length) & (place < 2 * length - 1)


def is_repeated(number: int, fraction: float) -> bool:
    """Whether the sample with this global number is a text twice.

    Among any n samples that follow one another, n * ``fraction`` are, rounded up or down.
    """
    return math.floor((number + 1) * fraction) > math.floor(number * fraction)


class Repeats:
    """Samples of which some are a text twice. Reads like the dataset that it is made from.

    Args:
        fraction: how many of the samples around this global number, 0 to 1.
    """

    def __init__(self, samples: SampleDataset, fraction: Callable[[int], float]) -> None:
        self.samples, self.fraction = samples, fraction

    def __len__(self) -> int:
        return len(self.samples)

    def __getitem__(self, idx: int) -> dict[str, Any]:
        """With ``repeated``, bool: whether the sample is a text twice."""
        sample, repeated = self.samples[idx], is_repeated(idx, self.fraction(idx))
        return {**(text_twice(sample)[0] if repeated else sample), "repeated": torch.tensor(repeated)}


class SecondCopies:
    """All samples as a text twice, where only what a model can copy counts in the loss: what recall is measured on."""

    def __init__(self, samples: SampleDataset) -> None:
        self.samples = samples

    def __len__(self) -> int:
        return len(self.samples)

    def __getitem__(self, idx: int) -> dict[str, Any]:
        sample, second = text_twice(self.samples[idx])
        return {**sample, "loss_mask": sample["loss_mask"] * second}
