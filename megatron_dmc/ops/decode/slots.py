"""What the cache keeps of tokens whose decisions have taken effect: slots, or the tokens that were not evicted."""

from dataclasses import replace

import torch
import torch.nn.functional as F
from torch import Tensor

from megatron_dmc.ops.attention.diagonal import diagonal_forward
from megatron_dmc.ops.attention.fading_keys import FarKeys
from megatron_dmc.ops.attention.flash import HIDDEN, flash_forward
from megatron_dmc.ops.attention.one_key import OneKey, join_one_key
from megatron_dmc.ops.attention.types import Attended, BiasedKeys, KernelSettings, join
from megatron_dmc.ops.decisions import hard_merge_logits
from megatron_dmc.ops.decode.open_slot import RecentTokens, RunningSums
from megatron_dmc.ops.decode.pages import Nearby, Pages
from megatron_dmc.ops.residual import Residual, ResidualState, residual
from megatron_dmc.ops.residual.torch import LEAST_MASS
from megatron_dmc.ops.rotary import rotate
from megatron_dmc.ops.tokens import Tokens


class Slots:
    """Rotated slots in pages; every (sequence, KV head) has its own number of them.

    Attributes:
        tokens: int64 [batch], tokens taken in.
    """

    def __init__(self, like: Tokens, page_size: int):
        batch, _, self.kv_heads, head_dim = like.key.shape
        self.tokens = torch.zeros(batch, dtype=torch.long, device=like.key.device)
        self.pages = Pages(batch * self.kv_heads, head_dim, page_size, like.key.dtype, like.key.device)

    def step(self, new: Tokens, exists: Tensor | None) -> None:
        """One token of every row, or of those where ``exists`` [batch]; a row without one has had none before."""
        raise NotImplementedError

    def chunk(self, query: Tensor, new: Tokens, lengths: Tensor, settings: KernelSettings) -> Attended:
        """Takes in many tokens, lengths [batch] of them real, and lets their queries see them and all before.

        Args:
            query: [batch, seq, heads, head_dim], one per token.
            settings: causal.
        """
        raise NotImplementedError

    def open(self) -> list[Nearby]:
        """Slots beside the pages."""
        return []

    @property
    def count(self) -> Tensor:
        """int64 [batch, kv_heads]"""
        return self.pages.lengths.view(-1, self.kv_heads)

    def select(self, sequences: Tensor) -> None:
        heads = torch.arange(self.kv_heads, device=sequences.device)
        self.pages.select((sequences[:, None] * self.kv_heads + heads).flatten())
        self.tokens = self.tokens[sequences]

    def tensors(self) -> list[Tensor]:
        return [self.tokens, *self.pages.tensors()]

    def _with_past(self, query: Tensor, settings: KernelSettings, chunk: Attended) -> Attended:
        """Joins a chunk's attention to itself with its attention to the pages."""
        if self.pages.used == 0:
            return chunk
        past = BiasedKeys(*(x.unflatten(0, (-1, self.kv_heads)).transpose(1, 2) for x in self.pages.padded()))
        return join(chunk, flash_forward(query, past, replace(settings, causal=False)))

    def _append(self, chosen: Tensor, key: Tensor, value: Tensor) -> None:
        """Writes the tokens chosen [batch, seq, kv_heads] of key and value [batch, seq, kv_heads, head_dim] to pages."""
        sequence, head, position = chosen.transpose(1, 2).nonzero(as_tuple=True)
        self.pages.append(
            sequence * self.kv_heads + head, key[sequence, position, head], value[sequence, position, head]
        )


class MergedSlots(Slots):
    """Closed slots in pages, and one open slot per (sequence, KV head). Takes keys before rotary embedding.

    The open slot is held twice: as unrotated sums, and as attention sees it, rotated at its latest token's position. It is
    written to the pages when the next token appends, so no slot is written twice.
    """

    def __init__(self, like: Tokens, page_size: int, window_size: int | None, clears_last_channel: bool):
        super().__init__(like, page_size)
        self.clears_last_channel = clears_last_channel
        self.sums = RunningSums(like.key) if window_size is None else RecentTokens(like.key, window_size)
        # The open slots, [batch, 1, kv_heads, head_dim]; the key rotated.
        self.open_key, self.open_value = (torch.zeros_like(like.key[:, :1]) for _ in range(2))

    def step(self, new: Tokens, exists: Tensor | None) -> None:
        begun = (self.tokens > 0)[:, None]
        merges, omega = begun & new.alpha[:, 0], new.omega[:, 0]
        closes = begun & ~merges
        if exists is not None:
            # A row without a token merges one of weight 0, which changes no sum.
            merges, omega = merges | ~exists[:, None], omega * exists[:, None]
        self._append(closes[:, None], self.open_key, self.open_value)
        self.sums.step(new.key[:, 0], new.value[:, 0], merges, omega)
        key, value = (x[:, None].to(new.key.dtype) for x in self.sums.pooled())
        self._reopen(self._rotate(key, new), value, exists)
        self.tokens = self.tokens + (1 if exists is None else exists)

    def chunk(self, query: Tensor, new: Tokens, lengths: Tensor, settings: KernelSettings) -> Attended:
        begun = (self.tokens > 0)[:, None]
        merges = begun & new.alpha[:, 0]
        self._append((begun & ~merges & (lengths > 0)[:, None])[:, None], self.open_key, self.open_value)
        alpha = torch.cat([merges[:, None], new.alpha[:, 1:]], dim=1)
        key, value = self.sums.chunk(new.key, new.value, alpha, new.omega, lengths)
        key = self._rotate(key, new)
        fade_logits = F.pad(hard_merge_logits(alpha[:, 1:].float()), (0, 0, 0, 1), value=float("-inf"))
        attended = diagonal_forward(query, FarKeys(key, value, fade_logits), settings)
        attended = self._with_past(query, settings, attended)

        # Token j's slot closes when token j + 1 appends.
        real = torch.arange(1, key.shape[1], device=key.device) < lengths[:, None]
        self._append(~alpha[:, 1:] & real[..., None], key[:, :-1], value[:, :-1])
        row, last = torch.arange(len(lengths), device=key.device), (lengths - 1).clamp(min=0)
        self._reopen(key[row, last][:, None], value[row, last][:, None], lengths > 0)
        self.tokens = self.tokens + lengths
        return attended

    def open(self) -> list[Nearby]:
        key, value = (x.transpose(1, 2).flatten(0, 1) for x in (self.open_key, self.open_value))
        return [Nearby.unless((self.tokens == 0).repeat_interleave(self.kv_heads)[:, None], key, value)]

    @property
    def count(self) -> Tensor:
        return super().count + (self.tokens > 0)[:, None]

    def select(self, sequences: Tensor) -> None:
        super().select(sequences)
        self.sums.select(sequences)
        self.open_key, self.open_value = self.open_key[sequences], self.open_value[sequences]

    def tensors(self) -> list[Tensor]:
        return [*super().tensors(), self.open_key, self.open_value, *self.sums.tensors()]

    def _reopen(self, key: Tensor, value: Tensor, rows: Tensor | None) -> None:
        if rows is not None:
            changed = rows[:, None, None, None]
            key, value = torch.where(changed, key, self.open_key), torch.where(changed, value, self.open_value)
        self.open_key, self.open_value = key, value

    def _rotate(self, key: Tensor, new: Tokens) -> Tensor:
        key = rotate(key, new.cos, new.sin)
        if self.clears_last_channel:
            key[..., -1] = 0
        return key


class KeptTokens(Slots):
    """The tokens with alpha 0, and every sequence's first (DMS, arXiv 2506.05345). Takes rotated keys."""

    def step(self, new: Tokens, exists: Tensor | None) -> None:
        kept = ~new.alpha | (self.tokens == 0)[:, None, None]
        real = None if exists is None else exists[:, None, None]
        self._take_leave(new, ~kept if real is None else ~kept & real)
        self._append(kept if real is None else kept & real, new.key, new.value)
        self.tokens = self.tokens + (1 if exists is None else exists)

    def chunk(self, query: Tensor, new: Tokens, lengths: Tensor, settings: KernelSettings) -> Attended:
        position = torch.arange(new.key.shape[1], device=lengths.device)
        first = (self.tokens[:, None] + position == 0)[..., None]
        kept = ~new.alpha | first
        real = (position < lengths[:, None])[..., None]
        bias = torch.zeros(kept.shape, device=kept.device).masked_fill_(~kept, HIDDEN)
        attended = flash_forward(query, BiasedKeys(new.key, new.value, bias), settings)
        attended = self._with_past(query, settings, attended)
        after_each = self._take_leave(new, ~kept & real)
        if after_each is not None:
            attended = join_one_key(query, attended, OneKey(*after_each), settings.softmax_scale)
        self._append(kept & real, new.key, new.value)
        self.tokens = self.tokens + lengths
        return attended

    def _take_leave(self, new: Tokens, gone: Tensor) -> Residual | None:
        """What becomes of the tokens ``gone``, bool [batch, seq, kv_heads]: nothing here."""
        return None


class AbsorbedTokens(KeptTokens):
    """As KeptTokens; the others are absorbed into one residual slot per (sequence, KV head), held as its sums."""

    def __init__(self, like: Tokens, page_size: int):
        super().__init__(like, page_size)
        batch, _, kv_heads, head_dim = like.key.shape
        wide = torch.promote_types(like.key.dtype, torch.float32)
        sums = torch.zeros(2, batch, kv_heads, head_dim, dtype=wide, device=like.key.device)
        self.state = ResidualState(sums[0], sums[1], sums.new_zeros(batch, kv_heads))
        self.dtype = like.key.dtype

    def open(self) -> list[Nearby]:
        mass = self.state.mass.flatten()[:, None]
        key, value = (
            (x.flatten(0, 1)[:, None] / mass.clamp(min=LEAST_MASS)[..., None]).to(self.dtype) for x in self.state[:2]
        )
        return [Nearby(key, value, mass.log())]

    @property
    def count(self) -> Tensor:
        return super().count + (self.state.mass > 0)

    def select(self, sequences: Tensor) -> None:
        super().select(sequences)
        self.state = ResidualState(*(x[sequences] for x in self.state))

    def tensors(self) -> list[Tensor]:
        return [*super().tensors(), *self.state]

    def _take_leave(self, new: Tokens, gone: Tensor) -> Residual:
        weight = new.omega.to(self.state.mass.dtype) * gone
        after_each, self.state = residual(new.key, new.value, weight, initial_state=self.state)
        return after_each
