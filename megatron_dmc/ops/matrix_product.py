"""Matrix products that autocast does not change."""

import torch
from torch import Tensor


def matrix_product(x: Tensor, y: Tensor) -> Tensor:
    """x @ y in their own dtype. Autocast would turn float32 into bf16."""
    device = x.device.type
    # The meta device has no autocast.
    if not torch.amp.is_autocast_available(device) or not torch.is_autocast_enabled(device):
        return x @ y
    with torch.autocast(device, enabled=False):
        return x @ y
