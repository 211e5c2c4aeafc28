"""The residual slot: its arguments are checked, then an implementation runs."""

import torch
from torch import Tensor

from megatron_dmc.ops.backend import choose
from megatron_dmc.ops.residual import naive
from megatron_dmc.ops.residual.torch import residual as torch_residual
from megatron_dmc.ops.residual.types import Residual, ResidualState


def residual(
    key: Tensor,
    value: Tensor,
    weight: Tensor,
    *,
    document_starts: Tensor | None = None,
    initial_state: ResidualState | None = None,
    backend: str = "auto",
) -> tuple[Residual, ResidualState]:
    """The weighted mean of all tokens up to each one, and the logarithm of their weight.

    N_t = sum of weight_j over j <= t, K_t = sum of weight_j key_j / N_t, V_t likewise. Sums are float32 (float64 for float64
    inputs), under autocast too. Differentiable in key, value, weight and the state. Where N_t is 0 the means are 0,
    log_mass is -inf and gradients are 0.

    Args:
        key, value: [batch, seq, kv_heads, head_dim], the key rotated.
        weight: [batch, seq, kv_heads], >= 0: alpha omega.
        document_starts: bool [batch, seq], true at the first token of a document: it is not absorbed, and the sums begin anew.
            A row's first token is one too unless there is an initial_state.
        initial_state: the sums before the first token.
        backend: "auto", "torch", or "naive", the oracle, one token at a time.

    Returns:
        The slot after every token, its means in key's and value's dtype, and the sums after the last.

    Raises:
        ValueError: shapes do not fit or the backend is unknown.
    """
    if key.shape != value.shape or weight.shape != key.shape[:3]:
        raise ValueError(
            "residual needs key and value [b, s, kv_heads, d] and weight [b, s, kv_heads]; got key "
            f"{tuple(key.shape)}, value {tuple(value.shape)}, weight {tuple(weight.shape)}"
        )
    implementation = choose(backend, {"torch": torch_residual, "naive": naive.residual})
    starts = document_starts
    if starts is not None and initial_state is None:
        starts = torch.cat([torch.ones_like(starts[:, :1]), starts[:, 1:]], dim=1)
    return implementation(key, value, weight, starts, initial_state)
