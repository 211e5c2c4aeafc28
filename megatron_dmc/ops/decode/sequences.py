"""What all layers of a model know together, computed once for all of them: positions, rotations, what a call brings."""

from functools import cached_property
from typing import NamedTuple

import torch
from torch import Tensor

from megatron_dmc.ops.decode.layout import Layout
from megatron_dmc.ops.rotary import rotation_matrix


class Step:
    """One token of every sequence.

    Attributes:
        tokens: int64 [batch], seen. Whoever counts them adds the new one to this tensor.
        place: int64 [batch, 1], the new token's in the ring, where the token that leaves it lies.
        recent: int64 [batch, 1], where the token that leaves the ring goes among the reserved ones, with a ``window_size``.
        first: bool [batch, 1], the new token is its sequence's first.
        cos, sin: [batch, head_dim] of the new token's position.
        leaving_cos, leaving_sin: of the position of the token that leaves the ring; without a ring, of the new token's.
    """

    def __init__(self, layout: Layout, tokens: Tensor, new: tuple[Tensor, Tensor], leaving: tuple[Tensor, Tensor]):
        """tokens: seen before, int64 [batch]."""
        self.tokens = tokens
        self.clears_last_channel = layout.clears_last_channel
        self.first = (tokens == 0)[:, None]
        if layout.local_window:
            self.place = (tokens % layout.local_window)[:, None]
        if layout.recent:
            self.recent = ((tokens - layout.local_window) % layout.recent)[:, None]
        self.cos, self.sin = new
        self.leaving_cos, self.leaving_sin = leaving
        self._zeros: Tensor | None = None
        self._queries: Tensor | None = None

    @cached_property
    def sign(self) -> Tensor:
        """The sign of a decision to merge, [batch, 1], float32 or wider: a first token has nothing to merge into."""
        return torch.where(self.first, self.appends, -self.appends)

    @cached_property
    def appends(self) -> Tensor:
        """The sign of the other decision, []. float32 or wider."""
        return self.cos.new_full((), -1.0, dtype=torch.promote_types(self.cos.dtype, torch.float32))

    def queries(self, like: Tensor, kv_heads: int) -> Tensor:
        """Where a layer's queries [batch, heads, head_dim] go, by row: [batch * kv_heads + 1, group, head_dim], the last one
        zero; one tensor for all layers."""
        shape = (len(like) * kv_heads + 1, like.shape[1] // kv_heads, like.shape[2])
        if self._queries is None or self._queries.shape != shape:
            self._queries = like.new_zeros(shape)
        return self._queries

    def zeros(self, like: Tensor) -> Tensor:
        """Of a layer's output, float32 or wider: one tensor for all layers, which none of them changes."""
        if self._zeros is None or self._zeros.shape != like.shape:
            self._zeros = torch.zeros_like(like, dtype=torch.promote_types(like.dtype, torch.float32))
        return self._zeros

    @cached_property
    def one(self) -> Tensor:
        """A token's weight in units of itself, [1, 1, 1]; float32 or wider."""
        return self.cos.new_ones(1, 1, 1, dtype=torch.promote_types(self.cos.dtype, torch.float32))

    @cached_property
    def key_rotation(self) -> Tensor:
        """x @ it rotates x to the new token's position, [batch, head_dim, head_dim] in cos's dtype."""
        return rotation_matrix(self.cos, self.sin)

    @cached_property
    def query_rotation(self) -> Tensor:
        return self._cleared(self.key_rotation)

    @cached_property
    def mean_rotation(self) -> Tensor:
        """x @ it rotates x to the position of the token that leaves; float32 or wider."""
        wide = torch.promote_types(self.leaving_cos.dtype, torch.float32)
        return self._cleared(rotation_matrix(self.leaving_cos.to(wide), self.leaving_sin.to(wide)))

    @cached_property
    def entrance(self) -> Tensor:
        """x @ it takes a key's rotation back and leaves the value beside it as it is, [batch, 2 * head_dim, 2 * head_dim + 1];
        the last column is zero. float32 or wider."""
        cos, sin = (x.to(torch.promote_types(x.dtype, torch.float32)) for x in (self.leaving_cos, self.leaving_sin))
        d = cos.shape[-1]
        matrix = cos.new_zeros(len(cos), 2 * d, 2 * d + 1)
        matrix[:, :d, :d] = rotation_matrix(cos, -sin) / (cos * cos + sin * sin)[:, None]
        matrix[:, d:, d : 2 * d] = torch.eye(d, dtype=cos.dtype, device=cos.device)
        return matrix

    @cached_property
    def unit(self) -> Tensor:
        """Added to what has entered: a weight of one. [1, 1, 2 * head_dim + 1]"""
        unit = torch.zeros_like(self.entrance[:1, :1])
        unit[..., -1] = 1
        return unit

    def _cleared(self, matrix: Tensor) -> Tensor:
        if not self.clears_last_channel:
            return matrix
        return torch.cat([matrix[..., :-1], torch.zeros_like(matrix[..., :1])], dim=-1)


class ManyTokens(NamedTuple):
    """What must be known of sequences with any number of new tokens.

    Attributes:
        tokens: int64 [batch], seen, with the new ones.
        starts, counts: int64 [batch], each one's first among all new tokens, and how many it has.
        cos, sin: [n, head_dim] of the new tokens' positions.
        leaving_cos, leaving_sin: of the positions of the tokens that leave the ring when these come; without one, of theirs.
    """

    tokens: Tensor
    starts: Tensor
    counts: Tensor
    cos: Tensor
    sin: Tensor
    leaving_cos: Tensor
    leaving_sin: Tensor


class Chunk:
    """Many tokens at once, together with those that the rings hold: columns [batch, held + new], a row's oldest first.

    Attributes:
        tokens: int64 [batch], seen before.
        lengths: int64 [batch], how many of the new ones are real.
        held: int64 [batch], tokens in the ring.
        longest: the most of them.
        left_before: a token of some sequence had left its ring before.
        cos, sin: of the columns' positions, [batch, columns, 1, head_dim].
    """

    cos: Tensor
    sin: Tensor

    def __init__(self, layout: Layout, tokens: Tensor, lengths: Tensor | None, seq: int):
        self.window, self.seq = layout.local_window, seq
        self.tokens = tokens
        self.lengths = torch.full_like(tokens, seq) if lengths is None else lengths.to(tokens)
        self.held = tokens.clamp(max=self.window)
        of_all = [self.held.amax(), tokens.amax(), self.lengths.amin(), self.lengths.amax()]
        self.longest, most, least, last = torch.stack(of_all).tolist()
        if least < 0 or last > seq:
            raise ValueError(f"lengths must be within 0 and the {seq} tokens of the call, got {self.lengths.tolist()}")
        self.left_before = most > self.window
        self.gap = (self.longest - self.held)[:, None]

    @cached_property
    def column(self) -> Tensor:
        return torch.arange(self.longest + self.seq, device=self.held.device).expand(len(self.held), -1)

    @cached_property
    def place_before(self) -> Tensor:
        """int64 [batch, longest], where in the ring the tokens lie that it holds."""
        first = (self.tokens - self.held)[:, None]
        return (first + self.column[:, : self.longest]) % max(self.window, 1)

    @cached_property
    def order(self) -> Tensor | None:
        """int64 [batch, columns]: which of [what the rings held, the new ones] a column is; None: as they are."""
        if not bool((self.gap > 0).any()):
            return None
        shifted = (self.column + self.gap).clamp(max=self.column.shape[1] - 1)
        return torch.where(self.column < self.held[:, None], self.column, shifted)

    @cached_property
    def latest(self) -> Tensor:
        """int64 [batch, local_window]: which column lies at each place of the ring afterwards; any, where none does."""
        place = torch.arange(self.window, device=self.held.device)
        last = (self.tokens + self.lengths)[:, None] - 1
        return (last - (last - place) % self.window - (self.tokens - self.held)[:, None]).clamp(min=0)

    @property
    def leaving(self) -> Tensor:
        """int64 [batch], how many columns leave the ring."""
        return (self.held + self.lengths - self.window).clamp(min=0)

    @cached_property
    def many(self) -> ManyTokens:
        """The same for rows that need no columns, the new ones of all sequences one after another."""
        batch, device = len(self.tokens), self.tokens.device
        new = self.held[:, None] + torch.arange(self.seq, device=device)
        columns = self.cos.shape[1]
        if columns == self.seq:  # those of the ring are not known: nobody asks for the leaving tokens'
            new = torch.arange(self.seq, device=device).expand(batch, -1)
        angles = [x[:, :, 0].expand(batch, -1, -1) for x in (self.cos, self.sin)]
        leaving = (new - self.window).clamp(min=0)
        turns = [x[self.row, at].flatten(0, 1) for at in (new, leaving) for x in angles]
        return ManyTokens(
            self.tokens + self.lengths, self.seq * torch.arange(batch, device=device), self.lengths, *turns
        )

    def arrange(self, before: Tensor, new: Tensor) -> Tensor:
        """[batch, longest, ...] and [batch, seq, ...] -> [batch, columns, ...]"""
        both = torch.cat([before.expand(len(new), *before.shape[1:]), new], dim=1)
        if self.order is None:
            return both
        return both[self.row, self.order]

    @cached_property
    def row(self) -> Tensor:
        return torch.arange(len(self.held), device=self.held.device)[:, None]


class Sequences:
    """Tokens seen of each sequence, and the rotations of those in the ring. The layers of a model share one.

    A layer names how many calls it has had; the first one that comes with a new call begins it for all.

    Attributes:
        tokens: int64 [batch]; None before the first call.
        angles: [batch, local_window, head_dim], cos and sin of the ring's tokens, one half of each, for ``merge``.
        calls: how many have begun.
    """

    def __init__(self, layout: Layout):
        self.layout = layout
        self.reset()

    def reset(self) -> None:
        self.tokens: Tensor | None = None
        self.angles: Tensor | None = None
        self.calls = 0
        self.finish()

    def finish(self) -> None:
        """Frees what only the layers of the last call needed."""
        self.call: Step | Chunk | None = None

    def select(self, sequences: Tensor) -> None:
        """Sequence i becomes what sequences[i] was."""
        if self.tokens is not None:
            self.tokens = self.tokens[sequences]
        if self.angles is not None:
            self.angles = self.angles[sequences]
        self.finish()

    def begin(self, cos: Tensor, sin: Tensor, lengths: Tensor | None, batch: int) -> Step | Chunk:
        """The next call of all layers: cos, sin [batch or 1, seq, 1, head_dim] of the new tokens' positions; lengths
        [batch], how many of a row's are real (None: all)."""
        seq = cos.shape[1]
        cos, sin = (x.expand(batch, -1, -1, -1) for x in (cos, sin))
        if self.tokens is None:
            self.start(cos)
            assert self.tokens is not None
        if seq == 1 and lengths is None:
            self.call = self._step(cos[:, 0, 0], sin[:, 0, 0])
            self.tokens.add_(1)
        else:
            self.call = self._chunk(cos, sin, lengths)
            self.tokens.add_(self.call.lengths)
        self.calls += 1
        return self.call

    def start(self, cos: Tensor) -> None:
        """No token yet of any sequence; cos [batch, seq, 1, head_dim] says what will come."""
        batch, window = len(cos), self.layout.local_window
        self.tokens = torch.zeros(batch, dtype=torch.long, device=cos.device)
        if window and self.layout.merges:
            half = cos.new_ones(batch, window, cos.shape[-1] // 2)
            self.angles = torch.cat([half, torch.zeros_like(half)], dim=-1)

    def _step(self, cos: Tensor, sin: Tensor) -> Step:
        assert self.tokens is not None
        if self.angles is None:
            return Step(self.layout, self.tokens, (cos, sin), (cos, sin))
        half = cos.shape[-1] // 2
        place = (self.tokens % self.layout.local_window)[:, None, None].expand(-1, 1, 2 * half)
        leaving_cos, leaving_sin = self.angles.gather(1, place)[:, 0].chunk(2, dim=-1)
        # Both halves of a rotation are alike.
        self.angles.scatter_(1, place, torch.cat([cos[:, :half], sin[:, :half]], dim=-1)[:, None])
        leaving = leaving_cos.repeat(1, 2), leaving_sin.repeat(1, 2)
        return Step(self.layout, self.tokens, (cos, sin), leaving)

    def _chunk(self, cos: Tensor, sin: Tensor, lengths: Tensor | None) -> Chunk:
        assert self.tokens is not None
        chunk = Chunk(self.layout, self.tokens.clone(), lengths, cos.shape[1])
        chunk.cos, chunk.sin = cos, sin
        if self.angles is not None:
            half = cos.shape[-1] // 2
            before = self.angles[chunk.row, chunk.place_before]
            new = torch.cat([cos[..., 0, :half], sin[..., 0, :half]], dim=-1)
            angles = chunk.arrange(before, new)
            chunk.cos, chunk.sin = (x.repeat(1, 1, 2)[:, :, None] for x in angles.chunk(2, dim=-1))
            self.angles.copy_(angles[chunk.row, chunk.latest])
        return chunk
