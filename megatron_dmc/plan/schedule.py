"""How many micro-batches wait for their backward pass at a time, under megatron-core's 1F1B schedules."""

from collections.abc import Sequence

from megatron.core.pipeline_parallel.schedules import get_schedule_table


def warmup(stage: int, stages: int, chunks: int, micro_batches: int) -> int:
    """Forward passes (of one chunk) that a stage runs before its first backward pass."""
    waiting = stages - stage - 1 if chunks == 1 else 2 * (stages - stage - 1) + (chunks - 1) * stages
    return min(waiting, chunks * micro_batches)


def most_kept(kept: Sequence[int], stage: int, stages: int, micro_batches: int) -> int:
    """Bytes that wait at the worst moment; ``kept``: what one micro-batch leaves on each of the stage's chunks."""
    if stages == 1:
        return kept[0]
    order = [chunk for _, chunk in get_schedule_table(micro_batches, len(kept), stages)]
    first = warmup(stage, stages, len(kept), micro_batches)
    forward = [kept[chunk] for chunk in order]
    backward = [kept[len(kept) - 1 - chunk] for chunk in order]
    held = most = sum(forward[:first])
    for arrives, leaves in zip(forward[first:], backward, strict=False):
        held += arrives
        most = max(most, held)
        held -= leaves
    return most


def bubble_share(stages: int, chunks: int, micro_batches: int) -> float:
    """Idle over busy time of a pipeline, (p - 1) / (m v) (Narayanan et al., arXiv 2104.04473)."""
    return (stages - 1) / (micro_batches * chunks)
