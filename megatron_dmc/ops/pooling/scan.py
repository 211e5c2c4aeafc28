"""First-order linear recurrences in parallel, exact where the decay is 0 or 1."""

import torch
from torch import Tensor

from megatron_dmc.ops.matrix_product import matrix_product

CHUNK = 32


def _decay_matrix(decay: Tensor) -> Tensor:
    """M[i, j] = prod of decay[j+1..i] for i >= j, else 0; [..., C] -> [..., C, C].

    Products of the decays themselves: differences of cumulative logarithms lose all digits near 0.
    """
    size = decay.shape[-1]
    below = torch.ones(size, size, dtype=torch.bool, device=decay.device).tril(-1)
    return torch.where(below, decay[..., :, None], 1).cumprod(dim=-2).tril()


def linear_scan(decay: Tensor, inputs: Tensor, initial: Tensor | None = None, *, reverse: bool = False) -> Tensor:
    """y_t = decay_t y_{t-1} + inputs_t; in reverse y_t = decay_{t+1} y_{t+1} + inputs_t.

    Chunks of 32 tokens are products with a triangular matrix; their ends form the same recurrence, 32 times shorter.

    Args:
        decay: [rows, seq].
        inputs: [rows, seq, channels].
        initial: [rows, channels], what comes before the first token, its decay already applied in reverse
            (decay_seq y_seq); None for zero.

    Returns:
        y: [rows, seq, channels].
    """
    rows, seq, channels = inputs.shape
    if seq <= CHUNK:
        matrix = _decay_matrix(decay)
        y = matrix_product(matrix.mT if reverse else matrix, inputs)
        if initial is not None:
            reach = matrix[:, -1] if reverse else matrix[:, :, 0] * decay[:, :1]
            y.addcmul_(reach[..., None], initial[:, None])
        return y

    whole = seq - seq % CHUNK
    if whole < seq and not reverse:
        head = linear_scan(decay[:, :whole], inputs[:, :whole], initial)
        return torch.cat([head, linear_scan(decay[:, whole:], inputs[:, whole:], head[:, -1])], dim=1)
    if whole < seq:
        tail = linear_scan(decay[:, whole:], inputs[:, whole:], initial, reverse=True)
        carry = decay[:, whole, None] * tail[:, 0]
        return torch.cat([linear_scan(decay[:, :whole], inputs[:, :whole], carry, reverse=True), tail], dim=1)

    decay = decay.view(rows, -1, CHUNK)
    matrix = _decay_matrix(decay)
    y = matrix_product(matrix.mT if reverse else matrix, inputs.view(rows, -1, CHUNK, channels))
    if reverse:
        # From the first token of a chunk to the first token of the next.
        stride_decay = torch.cat([decay[:, :1, 0], matrix[:, :-1, -1, 0] * decay[:, 1:, 0]], dim=1)
        first = linear_scan(stride_decay, y[:, :, 0], _reach_first(matrix, initial), reverse=True)
        carry = decay[:, 1:, 0, None] * first[:, 1:]
        y[:, :-1].addcmul_(matrix[:, :-1, -1, :, None], carry[:, :, None])
        if initial is not None:
            y[:, -1].addcmul_(matrix[:, -1, -1, :, None], initial[:, None])
    else:
        reach = matrix[..., 0] * decay[..., :1]
        last = linear_scan(reach[..., -1], y[:, :, -1], initial)
        y[:, 1:].addcmul_(reach[:, 1:, :, None], last[:, :-1, None])
        if initial is not None:
            y[:, 0].addcmul_(reach[:, 0, :, None], initial[:, None])
    return y.view(rows, seq, channels)


def _reach_first(matrix: Tensor, initial: Tensor | None) -> Tensor | None:
    """What comes after the last chunk, as its first token sees it."""
    return None if initial is None else matrix[:, -1, -1, :1] * initial
