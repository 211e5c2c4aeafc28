"""The residual slot token by token: the oracle."""

import torch
from torch import Tensor

from megatron_dmc.ops.residual.types import Residual, ResidualState


def residual(
    key: Tensor, value: Tensor, weight: Tensor, starts: Tensor | None, initial_state: ResidualState | None = None
) -> tuple[Residual, ResidualState]:
    """N_t = N_{t-1} + weight_t, K_t = sum of weight_j key_j / N_t, V_t likewise; all sums are 0 at a start."""
    if starts is None:
        starts = torch.zeros(key.shape[:2], dtype=torch.bool, device=key.device)
        starts[:, 0] = initial_state is None
    tokens = torch.cat([key, value], dim=-1)
    sums, mass = torch.zeros_like(tokens[:, 0]), torch.zeros_like(weight[:, 0])
    if initial_state is not None:
        sums, mass = torch.cat(initial_state[:2], dim=-1), initial_state.mass
    means, masses = [], []
    for t in range(key.shape[1]):
        sums, mass = sums + weight[:, t, :, None] * tokens[:, t], mass + weight[:, t]
        sums, mass = sums.masked_fill(starts[:, t, None, None], 0), mass.masked_fill(starts[:, t, None], 0)
        empty = mass == 0
        means.append((sums / mass.masked_fill(empty, 1)[..., None]).masked_fill(empty[..., None], 0))
        masses.append(mass.masked_fill(empty, 1).log().masked_fill(empty, float("-inf")))
    mean_key, mean_value = torch.stack(means, dim=1).chunk(2, dim=-1)
    key_sum, value_sum = sums.chunk(2, dim=-1)
    return Residual(mean_key, mean_value, torch.stack(masses, dim=1)), ResidualState(key_sum, value_sum, mass)
