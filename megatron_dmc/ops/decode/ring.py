"""The last tokens, raw, until their decisions take effect (algorithm.md, section 7)."""

import torch
from torch import Tensor

from megatron_dmc.ops.decode.pages import Nearby
from megatron_dmc.ops.tokens import Tokens, take


class Ring:
    """The last ``size`` tokens of every sequence; position p has place p mod size.

    Keys are rotated, as attention sees them. One copy is enough, because a rotation can be undone.

    Attributes:
        tokens: int64 [batch], tokens seen.
    """

    def __init__(self, like: Tokens, size: int):
        """An empty ring for each row of ``like``."""
        batch, _, kv_heads, head_dim = like.key.shape
        self.size = size
        self.tokens = torch.zeros(batch, dtype=torch.long, device=like.key.device)
        # Heads first: a decoding step reads a head's keys as one matrix.
        self.key, self.value = (like.key.new_zeros(batch, kv_heads, size, head_dim) for _ in range(2))
        self.alpha, self.omega = (x.new_zeros(batch, size, kv_heads) for x in (like.alpha, like.omega))
        # Both halves of a rotation are alike.
        self.cos = like.cos.new_ones(batch, size, 1, head_dim // 2)
        self.sin = torch.zeros_like(self.cos)

    def exchange(self, new: Tokens) -> tuple[Tokens, Tensor]:
        """Puts one token of every row in place of the oldest.

        Returns:
            The oldest, [batch, 1, ...], and bool [batch], whether the row's ring was full, so that there was one.
        """
        row, place = torch.arange(len(self.tokens), device=self.tokens.device), self.tokens % self.size
        oldest = self._read(place[:, None])
        self.key[row, :, place], self.value[row, :, place] = new.key[:, 0], new.value[:, 0]
        self._write_rest(row[:, None], place[:, None], new)
        full = self.tokens >= self.size
        self.tokens = self.tokens + 1
        return oldest, full

    def extend(self, new: Tokens, lengths: Tensor) -> tuple[Tokens, Tensor]:
        """Takes in many tokens, lengths [batch] of them real.

        Returns:
            What each row held, oldest first, and ``new`` after it; int64 [batch], how many tokens the row held.
        """
        held = self.tokens.clamp(max=self.size)
        longest = int(held.max())
        column = torch.arange(longest + new.key.shape[1], device=held.device).expand(len(held), -1)
        first = self.tokens - held
        before = self._read((first[:, None] + column[:, :longest]) % self.size)
        both = Tokens(*(torch.cat(parts, dim=1) for parts in zip(before, new, strict=True)))
        gap = (longest - held)[:, None]
        if bool(gap.any()):
            both = both.take(torch.where(column < held[:, None], column, (column + gap).clamp(max=column.shape[1] - 1)))

        self.tokens = self.tokens + lengths
        place = torch.arange(self.size, device=held.device)
        last = self.tokens[:, None] - 1
        # The latest position at each place, counted from the first that was held. Unused places hold any token.
        latest = (last - (last - place) % self.size - first[:, None]).clamp(min=0)
        kept = both.take(latest)
        self.key, self.value = kept.key.transpose(1, 2).contiguous(), kept.value.transpose(1, 2).contiguous()
        self._write_rest(slice(None), slice(None), kept)
        return both, held

    def nearby(self) -> Nearby:
        """Its tokens; those places are hidden where there is none yet."""
        empty = torch.arange(self.size, device=self.tokens.device) >= self.tokens[:, None]
        hidden = empty.repeat_interleave(self.key.shape[1], dim=0)
        return Nearby.unless(hidden, self.key.flatten(0, 1), self.value.flatten(0, 1))

    def select(self, sequences: Tensor) -> None:
        for name in ("tokens", "key", "value", "alpha", "omega", "cos", "sin"):
            setattr(self, name, getattr(self, name)[sequences])

    def tensors(self) -> list[Tensor]:
        return [self.tokens, self.key, self.value, self.alpha, self.omega, self.cos, self.sin]

    def _read(self, place: Tensor) -> Tokens:
        """place [batch, seq] -> the tokens there."""
        cos, sin = (take(x, place).repeat(1, 1, 1, 2) for x in (self.cos, self.sin))
        key, value = (take(x.transpose(1, 2), place) for x in (self.key, self.value))
        return Tokens(key, value, take(self.alpha, place), take(self.omega, place), cos, sin)

    def _write_rest(self, row: Tensor | slice, place: Tensor | slice, new: Tokens) -> None:
        half = self.cos.shape[-1]
        self.alpha[row, place], self.omega[row, place] = new.alpha, new.omega
        self.cos[row, place], self.sin[row, place] = new.cos[..., :half], new.sin[..., :half]
