"""Where packed documents lie is computed from the host's batch: nothing waits for the device that the tokens go to."""

import pytest
import torch

from megatron_dmc.model.documents import pack_documents
from megatron_dmc.ops.attention import Documents


def starts(*rows: list[int], seq: int) -> torch.Tensor:
    marks = torch.zeros(len(rows), seq, dtype=torch.bool)
    for row, places in enumerate(rows):
        marks[row, places] = True
    return marks


@pytest.mark.parametrize(
    ("rows", "longest"),
    [(([0, 5], [0]), 12), (([0, 5], [0, 2, 9]), 7), (([0],), 12), ((list(range(12)),), 2)],
    ids=["one whole row", "parts", "one document", "one token each"],
)
def test_longest_is_the_longest_documents_length(rows: tuple[list[int], ...], longest: int) -> None:
    documents = pack_documents(starts(*rows, seq=12)).documents
    assert documents is not None and documents.longest == longest


def test_a_flash_kernel_never_sees_a_longest_of_one() -> None:
    """With a maximum of 1 it takes its form for decoding."""
    for seq in (6, 5):
        later, left = Documents.from_starts(starts([0], seq=seq)).later(5)
        assert (later.longest, len(left)) == (2, seq - 5)
    assert Documents.from_starts(starts([0], seq=9)).later(5)[0].longest == 4


def test_the_device_gets_nothing_but_the_result() -> None:
    # On the meta device there are no values: whatever were computed there would fail.
    packed = pack_documents(starts([0, 5], [0], seq=12), torch.device("meta"))
    assert packed.documents is not None
    assert packed.documents.cu_seqlens.device.type == packed.cu_seqlens_q.device.type == "meta"
    assert packed.documents.cu_seqlens.shape == (4,) and packed.documents.longest == 12
