"""Decoding with a compressed cache, token by token, as the paper's section 3.1 writes it: the oracle."""

import math
from collections.abc import Callable
from dataclasses import dataclass, field

import torch
from torch import Tensor


@dataclass
class Slot:
    """Tokens that were merged into one another, in order, and the position of the latest."""

    tokens: list[tuple[Tensor, Tensor, Tensor]] = field(default_factory=list)
    position: int = 0

    def pooled(self, window_size: int | None) -> tuple[Tensor, Tensor]:
        """The weighted mean of the last ``window_size`` keys and values."""
        recent = self.tokens[-window_size:] if window_size else self.tokens
        keys, values, omegas = (torch.stack(x) for x in zip(*recent, strict=True))
        return omegas @ keys / omegas.sum(), omegas @ values / omegas.sum()


def decode(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    alpha: Tensor,
    omega: Tensor,
    rotate: Callable[[Tensor, int], Tensor],
    *,
    window_size: int | None = None,
    local_window: int = 0,
    operation: str = "merge",
) -> tuple[Tensor, list[Slot]]:
    """One sequence, one KV head: a token that is ``local_window`` tokens old merges into the last slot, appends one, or is
    evicted, or is absorbed; then the new token attends to all slots and to the tokens that still wait.

    What is absorbed is one more slot: the mean of the rotated keys, whose score is raised by the logarithm of their weight.

    Args:
        query: [seq, group, head_dim]; key, value: [seq, head_dim]; alpha (bool), omega: [seq]. Before rotary embedding.
        rotate: a vector and its position -> the rotated vector.

    Returns:
        [seq, group, head_dim] and the slots after the last token.
    """
    slots: list[Slot] = []
    residual = Slot()
    outputs = []
    for t in range(len(query)):
        due = t - local_window
        if due >= 0:
            appends = not slots or not alpha[due]
            if appends:
                slots.append(Slot())
            elif operation == "absorb":
                residual.tokens.append((rotate(key[due], due), value[due], omega[due]))
            if appends or operation == "merge":
                slots[-1].tokens.append((key[due], value[due], omega[due]))
                slots[-1].position = due
        pooled = [slot.pooled(window_size) for slot in slots]
        waiting = range(max(due + 1, 0), t + 1)
        keys = [rotate(k, slot.position) for slot, (k, _) in zip(slots, pooled, strict=True)]
        keys += [rotate(key[j], j) for j in waiting]
        values = [v for _, v in pooled] + [value[j] for j in waiting]
        biases = key.new_zeros(len(keys))
        if residual.tokens:
            mean_key, mean_value = residual.pooled(None)
            keys, values = [*keys, mean_key], [*values, mean_value]
            biases = torch.cat([biases, torch.stack([omega for *_, omega in residual.tokens]).sum().log()[None]])
        scores = rotate(query[t], t) @ torch.stack(keys).T / math.sqrt(key.shape[-1]) + biases
        outputs.append(scores.softmax(-1) @ torch.stack(values))
    return torch.stack(outputs), [*slots, residual] if residual.tokens else slots
