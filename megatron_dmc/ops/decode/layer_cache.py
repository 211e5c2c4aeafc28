"""The compressed cache of one layer, and attention through it."""

import math

import torch
from torch import Tensor

from megatron_dmc.ops.attention import dmc_attention
from megatron_dmc.ops.attention.flash import flash_forward
from megatron_dmc.ops.decisions import hard_logits
from megatron_dmc.ops.decode.open_slot import RecentTokens, RunningSums
from megatron_dmc.ops.decode.pages import Pages
from megatron_dmc.ops.rotary import rotate


class LayerCache:
    """Closed slots in pages, and one open slot per (sequence, KV head); every head has its own length.

    The open slot's latest token is always the sequence's last token. It is closed, that is rotated at that token's
    position and written to the pages, when the next token appends; so no slot is ever written twice.

    Attributes:
        tokens: int64 [batch], tokens seen of each sequence; empty before the first call.
    """

    def __init__(self, window_size: int | None = None, page_size: int = 16):
        self.window_size = window_size
        self.page_size = page_size
        self.reset()

    def reset(self) -> None:
        """Forgets everything and frees its memory."""
        nothing = torch.empty(0, 0, 0, 0)
        self._start(nothing, nothing)

    def _start(self, key: Tensor, cos: Tensor) -> None:
        batch, _, kv_heads, head_dim = key.shape
        self.dtype, self.kv_heads = key.dtype, kv_heads
        self.tokens = torch.zeros(batch, dtype=torch.long, device=key.device)
        self.pages = Pages(batch * kv_heads, head_dim, self.page_size, key.dtype, key.device)
        self.open = RunningSums(key) if self.window_size is None else RecentTokens(key, self.window_size)
        # Rotation of the last tokens, [batch, 1, 1, head_dim].
        self.last_cos, self.last_sin = (cos.new_zeros(batch, 1, 1, head_dim) for _ in range(2))

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
        bias_channel: int | None = None,
    ) -> Tensor:
        """Takes in the next tokens of every sequence and returns their attention: prefill, a later chunk, or one step.

        However the tokens are cut into calls, the result is the same (but for rounding).

        Args:
            query: [batch, seq, heads, head_dim], before rotary embedding.
            key, value: [batch, seq, kv_heads, head_dim], before rotary embedding.
            alpha: bool [batch, seq, kv_heads], merge into the previous token's slot; ignored at a sequence's first.
            omega: [batch, seq, kv_heads], the token's weight.
            cos, sin: of the tokens' positions, [batch or 1, seq, 1, head_dim].
            lengths: [batch], how many of the tokens are real; what stands behind them leaves no trace, and what comes
                out there means nothing. None: all.
            softmax_scale: 1 / sqrt(head_dim) by default.
            bias_channel: a channel that is kept zero in query and key, also after rotation (the ``neuron`` source).

        Returns:
            [batch, seq, heads, head_dim] in query's dtype.

        Raises:
            ValueError: the batch is not the cache's, or gradients are wanted.
        """
        if torch.is_grad_enabled() and (query.requires_grad or key.requires_grad or value.requires_grad):
            raise ValueError("the compressed cache gives no gradients: use torch.no_grad(), or attend without a cache")
        if len(self.tokens) == 0:
            self._start(key, cos)
        if len(key) != len(self.tokens):
            raise ValueError(f"the cache holds {len(self.tokens)} sequences, got {len(key)}; reorder or reset it first")
        scale = 1 / math.sqrt(query.shape[-1]) if softmax_scale is None else softmax_scale
        query = _rotate(query, cos, sin, bias_channel)
        begun = (self.tokens > 0)[:, None]
        appends = begun & ~alpha[:, 0]
        alpha = torch.cat([(begun & alpha[:, 0])[:, None], alpha[:, 1:]], dim=1)

        if key.shape[1] > 1 or lengths is not None:
            if lengths is None:
                lengths = torch.full_like(self.tokens, key.shape[1])
            self._close(appends & (lengths > 0)[:, None], bias_channel)
            return self._chunk(query, key, value, alpha, omega, cos, sin, lengths, scale, bias_channel)
        self._close(appends, bias_channel)
        self.open.step(key[:, 0], value[:, 0], alpha[:, 0], omega[:, 0])
        self._advance(cos, sin, torch.ones_like(self.tokens))
        own_key, own_value = self._open_slot(bias_channel)
        grouped = query[:, 0].unflatten(1, (key.shape[2], -1)).flatten(0, 1)
        out = self.pages.attend(grouped, own_key, own_value, scale)
        return out.to(query.dtype).view_as(query)

    def _chunk(
        self,
        query: Tensor,
        key: Tensor,
        value: Tensor,
        alpha: Tensor,
        omega: Tensor,
        cos: Tensor,
        sin: Tensor,
        lengths: Tensor,
        scale: float,
        bias_channel: int | None,
    ) -> Tensor:
        """Many tokens at once: causal attention among themselves, and of all to the slots that closed before."""
        batch, seq, kv_heads, _ = key.shape
        key, value = self.open.chunk(key, value, alpha, omega, lengths)
        key = _rotate(key, cos, sin, bias_channel)
        logits = hard_logits(alpha.float())
        if self.pages.used == 0:
            out = dmc_attention(query, key, value, logits, softmax_scale=scale, bias_channel=bias_channel)
        else:
            out, lse = dmc_attention(
                query, key, value, logits, softmax_scale=scale, bias_channel=bias_channel, return_lse=True
            )
            past = [x.unflatten(0, (batch, kv_heads)).transpose(1, 2) for x in self.pages.padded()]
            past_out, past_lse = flash_forward(
                query, *past, causal=False, softmax_scale=scale, bias_channel=bias_channel
            )
            out = torch.lerp(out, past_out, torch.sigmoid(past_lse - lse).to(out.dtype)[..., None])

        # Token j's slot closes when token j + 1 appends.
        real = torch.arange(1, seq, device=key.device) < lengths[:, None]
        sequence, head, position = (~alpha[:, 1:] & real[..., None]).transpose(1, 2).nonzero(as_tuple=True)
        self.pages.append(sequence * kv_heads + head, key[sequence, position, head], value[sequence, position, head])
        self._advance(cos, sin, lengths)
        return out

    def _open_slot(self, bias_channel: int | None) -> tuple[Tensor, Tensor]:
        """The open slot, rotated at the last token: key and value [batch * kv_heads, head_dim]."""
        key, value = (x.to(self.dtype) for x in self.open.pooled())
        key = _rotate(key[:, None], self.last_cos, self.last_sin, bias_channel)
        return key.flatten(0, 2), value.flatten(0, 1)

    def _close(self, closing: Tensor, bias_channel: int | None) -> None:
        """Writes the open slots of the rows marked in closing [batch, kv_heads] to the pages."""
        row = closing.flatten().nonzero()[:, 0]
        if len(row):
            key, value = self._open_slot(bias_channel)
            self.pages.append(row, key[row], value[row])

    def _advance(self, cos: Tensor, sin: Tensor, lengths: Tensor) -> None:
        """Counts the tokens and remembers the last one's rotation."""
        batch = len(self.tokens)
        row, last = torch.arange(batch, device=cos.device), (lengths - 1).clamp(min=0)
        moved = (lengths > 0)[:, None, None, None]
        cos, sin = (x.expand(batch, -1, -1, -1)[row, last][:, None] for x in (cos, sin))
        self.last_cos, self.last_sin = torch.where(moved, cos, self.last_cos), torch.where(moved, sin, self.last_sin)
        self.tokens = self.tokens + lengths

    def select(self, sequences: Tensor) -> None:
        """Sequence i becomes what sequences[i] was: beam search, repetition, dropping finished ones and their memory.

        Args:
            sequences: [new batch], int64.
        """
        if len(self.tokens) == 0 or len(sequences) == 0:
            return self.reset()
        sequences = sequences.to(self.tokens.device)
        heads = torch.arange(self.kv_heads, device=sequences.device)
        self.pages.select((sequences[:, None] * self.kv_heads + heads).flatten())
        self.open.select(sequences)
        self.tokens = self.tokens[sequences]
        self.last_cos, self.last_sin = self.last_cos[sequences], self.last_sin[sequences]

    @property
    def slots(self) -> Tensor:
        """Slots in use, the open ones counted: int64 [batch, kv_heads]."""
        return self.pages.lengths.view(-1, max(self.kv_heads, 1)) + (self.tokens > 0)[:, None]

    @property
    def nbytes(self) -> int:
        """Everything held: pages with their slack and tables, open slots, the last tokens' rotation."""
        held = [self.tokens, self.last_cos, self.last_sin, *self.pages.tensors(), *self.open.tensors()]
        storages = {x.untyped_storage().data_ptr(): x.untyped_storage() for x in held}
        return sum(storage.nbytes() for storage in storages.values())


def _rotate(x: Tensor, cos: Tensor, sin: Tensor, bias_channel: int | None) -> Tensor:
    x = rotate(x, cos, sin)
    if bias_channel is not None:
        x[..., bias_channel] = 0
    return x
