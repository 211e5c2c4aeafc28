"""The compressed cache of one layer, and attention through it."""

import math
from dataclasses import replace

import torch
from torch import Tensor

from megatron_dmc.ops.attention.flash import flash_forward
from megatron_dmc.ops.attention.types import Attended, BiasedKeys, KernelSettings, Operation, join
from megatron_dmc.ops.decode.ring import Ring
from megatron_dmc.ops.decode.slots import AbsorbedTokens, KeptTokens, MergedSlots, Slots
from megatron_dmc.ops.rotary import rotate, unrotate
from megatron_dmc.ops.tokens import Tokens, take


class LayerCache:
    """A ring of the last tokens, raw, and the slots of all earlier ones; every head has its own number of slots.

    Args:
        local_window: tokens in the ring. A decision takes effect when its token leaves it.
        operation: what becomes of a token with alpha 1 then.
        window_size: tokens that a slot's mean is truncated to, see DMCConfig.
        clears_last_channel: the last channel of queries and keys is set to zero after the rotation (the ``neuron``
            source).
        page_size: slots that are allocated together.
    """

    def __init__(
        self,
        local_window: int = 0,
        operation: Operation = "merge",
        window_size: int | None = None,
        *,
        clears_last_channel: bool = False,
        page_size: int = 16,
    ):
        self.local_window, self.operation, self.window_size = local_window, operation, window_size
        self.clears_last_channel, self.page_size = clears_last_channel, page_size
        self.reset()

    def reset(self) -> None:
        """Forgets everything and frees its memory."""
        self.ring: Ring | None = None
        self.kept: Slots | None = None

    def _start(self, like: Tokens) -> Slots:
        if self.local_window:
            self.ring = Ring(like, self.local_window)
        if self.operation == "evict":
            return KeptTokens(like, self.page_size)
        if self.operation == "absorb":
            return AbsorbedTokens(like, self.page_size)
        return MergedSlots(like, self.page_size, self.window_size, self.clears_last_channel)

    @property
    def tokens(self) -> Tensor:
        """Tokens seen of each sequence, int64 [batch]; empty before the first call."""
        if self.ring is not None:
            return self.ring.tokens
        return torch.zeros(0, dtype=torch.long) if self.kept is None else self.kept.tokens

    def attend(
        self,
        query: Tensor,
        key: Tensor,
        value: Tensor,
        alpha: Tensor,
        omega: Tensor,
        cos: Tensor,
        sin: Tensor,
        *,
        lengths: Tensor | None = None,
        softmax_scale: float | None = None,
    ) -> Tensor:
        """Takes in the next tokens of every sequence and returns their attention: prefill, a later chunk, or one step.

        The result does not depend on how the tokens are cut into calls (but for rounding).

        Args:
            query: [batch, seq, heads, head_dim], before rotary embedding.
            key, value: [batch, seq, kv_heads, head_dim], before rotary embedding.
            alpha: bool [batch, seq, kv_heads], true: merge into the slot of the token before, evict, or absorb; ignored at a
                sequence's first token.
            omega: [batch, seq, kv_heads], the tokens' weights.
            cos, sin: of the tokens' positions, [batch or 1, seq, 1, head_dim].
            lengths: [batch], how many of a row's tokens are real. Positions past a row's length are padding: the cache
                ignores them and their outputs are undefined. None: all are real.
            softmax_scale: 1 / sqrt(head_dim) by default.

        Returns:
            [batch, seq, heads, head_dim] in query's dtype.

        Raises:
            ValueError: the batch is not the cache's, there is no token, or gradients are wanted.
        """
        if torch.is_grad_enabled() and any(x.requires_grad for x in (query, key, value, omega)):
            raise ValueError("the compressed cache gives no gradients: use torch.no_grad(), or attend without a cache")
        if key.shape[1] == 0:
            raise ValueError("the compressed cache takes in at least one token, got none")
        cos, sin = (x.expand(len(key), -1, -1, -1) for x in (cos, sin))
        new = Tokens(key, value, alpha, omega, cos, sin)
        if self.kept is None:
            self.kept = self._start(new)
        if self.tokens.is_inference() and not torch.is_inference_mode_enabled():
            # Nothing can be written to such tensors here. Selecting every sequence copies all of them.
            self.select(torch.arange(len(self.tokens)))
        if len(key) != len(self.tokens):
            raise ValueError(f"the cache holds {len(self.tokens)} sequences, got {len(key)}; reorder or reset it first")
        scale = 1 / math.sqrt(query.shape[-1]) if softmax_scale is None else softmax_scale
        query = rotate(query, cos, sin)
        if self.clears_last_channel:
            query[..., -1] = 0
        if self.ring is not None:
            # Its last channel is not cleared: the rotation must be undone, and the query's is zero.
            new = new._replace(key=rotate(key, cos, sin))
        if key.shape[1] == 1 and lengths is None:
            return self._step(query, new, self.kept, scale)
        if lengths is None:
            lengths = torch.full_like(self.tokens, key.shape[1])
        return self._chunk(query, new, self.kept, lengths, scale)

    def _step(self, query: Tensor, new: Tokens, kept: Slots, scale: float) -> Tensor:
        """One token of every row."""
        if self.ring is None:
            kept.step(new, None)
        else:
            oldest, exists = self.ring.exchange(new)
            kept.step(self._as_kept(oldest), exists)
        nearby = kept.open() + ([] if self.ring is None else [self.ring.nearby()])
        grouped = query[:, 0].unflatten(1, (new.key.shape[2], -1)).flatten(0, 1)
        return kept.pages.attend(grouped, nearby, scale).to(query.dtype).view_as(query)

    def _chunk(self, query: Tensor, new: Tokens, kept: Slots, lengths: Tensor, scale: float) -> Tensor:
        """Many tokens at once, in parallel."""
        settings = KernelSettings(scale, bias_channel=-1 if self.clears_last_channel else None)
        if self.ring is None:
            return kept.chunk(query, new, lengths, settings).out
        window = self.local_window
        both, held = self.ring.extend(new, lengths)
        # A query takes its own token's column. Any query fills the columns before; their outputs are not read.
        seq, columns = query.shape[1], both.key.shape[1]
        query = take(query, (torch.arange(columns, device=held.device) - held[:, None]).clamp(0, seq - 1))
        out, lse = flash_forward(query, BiasedKeys(both.key, both.value, None), replace(settings, window=window))
        if columns > window:
            # A query's token pushes out the token one window earlier.
            leaving = self._as_kept(Tokens(*(x[:, : columns - window] for x in both)))
            count = (held + lengths - window).clamp(min=0)
            far = kept.chunk(query[:, window:], leaving, count, settings)
            out[:, window:] = join(Attended(out[:, window:], lse[:, window:]), far).out
        return take(out, held[:, None] + torch.arange(seq, device=held.device))

    def _as_kept(self, leaving: Tokens) -> Tokens:
        """Merging happens before rotary embedding."""
        if self.operation != "merge":
            return leaving
        return leaving._replace(key=unrotate(leaving.key, leaving.cos, leaving.sin))

    def select(self, sequences: Tensor) -> None:
        """Sequence i becomes what sequences[i] was. For beam search, repetition, and to free finished sequences.

        Args:
            sequences: [new batch], int64.
        """
        if self.kept is None or len(sequences) == 0:
            return self.reset()
        sequences = sequences.to(self.tokens.device)
        self.kept.select(sequences)
        if self.ring is not None:
            self.ring.select(sequences)

    @property
    def slots(self) -> Tensor:
        """Slots in use; open and residual ones and the ring's tokens count: int64 [batch, kv_heads]."""
        if self.kept is None:
            return torch.zeros(0, 1, dtype=torch.long)
        if self.ring is None:
            return self.kept.count
        return self.kept.count + self.tokens.clamp(max=self.local_window)[:, None]

    @property
    def nbytes(self) -> int:
        """Bytes held: pages with their unused slots and tables, open and residual slots and their sums, the ring."""
        held = [] if self.kept is None else self.kept.tensors()
        held += [] if self.ring is None else self.ring.tensors()
        storages = {x.untyped_storage().data_ptr(): x.untyped_storage() for x in held}
        return sum(storage.nbytes() for storage in storages.values())
