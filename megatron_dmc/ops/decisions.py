"""Logits of the merge decision alpha and of the weight omega (paper, section 3.1; DMS, arXiv 2506.05345, for projection).

decision_logits a -> merge_logits l, with noise and temperature in training, binary elsewhere -> alpha = sigmoid(l).
"""

import torch
from torch import Tensor

# Between what exp turns these into lie the weights of absorbed tokens: sums of millions stay finite, and above zero.
LEAST_LOG_OMEGA, MOST_LOG_OMEGA = -15.0, 8.0


def neuron_logits(query: Tensor, key: Tensor, bias: float, omega_bias: float) -> tuple[Tensor, Tensor]:
    """The ``neuron`` source: a_t = k_t[-1] - c, b_t = mean of q_t[-1] over the query heads that share the KV head, + c.

    Args:
        query: [batch, seq, heads, head_dim] before rotary embedding.
        key: [batch, seq, kv_heads, head_dim] before rotary embedding.
        bias: c.
        omega_bias: what is added to b: c, or 0 where tokens are absorbed.

    Returns:
        decision_logits a, omega_logits b: [batch, seq, kv_heads], float32 or wider.
    """
    decision_logits = _wide(key[..., -1]) - bias
    omega_logits = _wide(query[..., -1]).unflatten(-1, (key.shape[-2], -1)).mean(-1) + omega_bias
    return decision_logits, omega_logits


def projection_logits(projected: Tensor, bias: float, omega_bias: float, scale: float) -> tuple[Tensor, Tensor]:
    """The ``projection`` source: [a_t, b_t] = s (W h_t + beta) + (-c, +c).

    Args:
        projected: W h + beta, [batch, seq, 2 * kv_heads], interleaved per KV head: a_0, b_0, a_1, b_1, ...
        bias: c.
        omega_bias: what is added to b: c, or 0 where tokens are absorbed.
        scale: s.

    Returns:
        decision_logits a, omega_logits b: [batch, seq, kv_heads], float32 or wider.
    """
    decision_logits, omega_logits = (scale * _wide(projected)).unflatten(-1, (-1, 2)).unbind(-1)
    return decision_logits - bias, omega_logits + omega_bias


def omega_from_logits(omega_logits: Tensor, floor: float) -> Tensor:
    """omega = sigmoid(b) + floor. The floor keeps a slot's weight above 0."""
    return torch.sigmoid(omega_logits) + floor


def omega_of_absorbed(omega_logits: Tensor) -> Tensor:
    """omega = exp(b), b clamped to -15 ... 8: the weight of a token in the residual slot."""
    return omega_logits.clamp(LEAST_LOG_OMEGA, MOST_LOG_OMEGA).exp()


def relaxed_merge_logits(decision_logits: Tensor, noise: Tensor, temperature: float) -> Tensor:
    """Merge logits in training: l = (a + noise) / temperature. alpha = sigmoid(l) is the Gumbel-sigmoid of section 3.2."""
    return (decision_logits + noise) / temperature


def hard_merge_logits(decision_logits: Tensor, threshold: float | Tensor = 0.0) -> Tensor:
    """Merge logits of the binary decision 1[a > threshold]: +inf where it merges, -inf where it appends."""
    return torch.where(decision_logits > threshold, float("inf"), float("-inf")).to(decision_logits.dtype)


def clear_channel(x: Tensor) -> Tensor:
    """x with its last channel set to zero; gradients of that channel stop here."""
    return torch.nn.functional.pad(x[..., :-1], (0, 1))


def _wide(x: Tensor) -> Tensor:
    return x if x.dtype == torch.float64 else x.float()
