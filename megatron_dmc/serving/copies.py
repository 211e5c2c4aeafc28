"""Numbers between host and device without waiting for either."""

from collections.abc import Callable, Sequence

import torch
from torch import Tensor


def to_device(
    parts: Sequence[Sequence[float]], device: torch.device, dtype: torch.dtype = torch.int64
) -> tuple[Tensor, ...]:
    """Each part in this dtype on the device, by one copy in the order of the current stream.

    The pinned memory is torch's: it is used again only once the copy has been made, so steps in flight cannot overwrite one
    another's numbers.
    """
    numbers = torch.tensor([x for part in parts for x in part], dtype=dtype, pin_memory=device.type == "cuda")
    return numbers.to(device, non_blocking=True).split([len(part) for part in parts])


def to_host(numbers: Tensor) -> Callable[[], list[list[int]]]:
    """Begins to copy a matrix into pinned memory; what is returned waits until it is there."""
    if not numbers.is_cuda:
        return numbers.tolist
    there = numbers.to("cpu", non_blocking=True)
    event = torch.cuda.Event(blocking=True)
    event.record()

    def wait() -> list[list[int]]:
        event.synchronize()
        return list(there.tolist())

    return wait
