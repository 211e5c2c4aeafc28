"""Decoding with a compressed cache, token by token, as the paper's section 3.1 writes it: the oracle."""

import functools
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
    cache_dtype: str | None = None,
) -> tuple[Tensor, list[Slot]]:
    """One sequence, one KV head: a token that is ``local_window`` tokens old merges into the last slot, appends one, or is
    evicted, or is absorbed; then the new token attends to all slots and to the tokens that still wait.

    What is absorbed is one more slot: the mean of the rotated keys, whose score is raised by the logarithm of their weight.
    With a ``cache_dtype`` attention sees what codes give back of all slots but this one; tokens that wait are as they are.

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
        pooled = [(rotate(k, slot.position), v) for slot, (k, v) in zip(slots, pooled, strict=True)]
        if cache_dtype is not None:
            pooled = [(key_as_codes(k, cache_dtype), as_codes(v, cache_dtype)) for k, v in pooled]
        keys = [k for k, _ in pooled]
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


def as_codes(x: Tensor, cache_dtype: str) -> Tensor:
    """What codes leave of [head_dim] channels, float64: the nearest fp8, or group by group offset + step * code."""
    if cache_dtype == "fp8":
        return torch.tensor([min(max(to_grid(y, 4, -6, round), -448.0), 448.0) for y in x.tolist()], dtype=x.dtype)
    most = 15 if cache_dtype == "int4" else 255
    size = max(n for n in range(1, 65) if len(x) % n == 0)
    groups = []
    for group in x.split(size):
        offset = to_grid(float(group.min()), 8, -126, math.floor)
        step = max(to_grid((float(group.max()) - offset) / most, 8, -126, math.ceil), 2.0**-126)
        groups.append(offset + step * ((group - offset) / step).round())
    return torch.cat(groups)


def key_as_codes(key: Tensor, cache_dtype: str) -> Tensor:
    """The same of a key, which is turned before it is rounded, and turned back; for fp8 it is not."""
    if cache_dtype == "fp8":
        return as_codes(key, cache_dtype)
    size = len(key) & -len(key)
    turn = hadamard(size).to(key.dtype)
    held = as_codes(torch.cat([turn @ block for block in key.split(size)]), cache_dtype)
    return torch.cat([turn @ block for block in held.split(size)])


def to_grid(x: float, digits: int, least: int, rounding: Callable[[float], int]) -> float:
    """The number next to x of so many binary digits, whose exponent is not below ``least``: with 8 and -126 a bf16."""
    unit = 2.0 ** (max(math.frexp(x)[1] - 1, least) - digits + 1)
    return rounding(x / unit) * unit


@functools.cache
def hadamard(size: int) -> Tensor:
    """[size, size], float64; its own inverse."""
    index = range(size)
    signs = [[(-1.0) ** (i & j).bit_count() for j in index] for i in index]
    return torch.tensor(signs, dtype=torch.float64) / math.sqrt(size)
