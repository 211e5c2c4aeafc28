"""The compressed cache of one layer, and attention through it."""

import copy
import math
from collections.abc import Callable, Mapping
from dataclasses import asdict
from typing import Any

import torch
from torch import Tensor

from megatron_dmc.ops.attention.types import Operation
from megatron_dmc.ops.backend import choose
from megatron_dmc.ops.decode import cpp, triton
from megatron_dmc.ops.decode.chunk import take_in_chunk
from megatron_dmc.ops.decode.codes import CacheDtype, check_cache_dtype
from megatron_dmc.ops.decode.layout import Layout
from megatron_dmc.ops.decode.rows import AHEAD, Rows
from megatron_dmc.ops.decode.sequences import Sequences, Step
from megatron_dmc.ops.decode.state import bytes_of, change_tensors, restored, tensors
from megatron_dmc.ops.decode.torch import step as torch_step
from megatron_dmc.ops.tokens import Tokens

# What a call says that finds the traces of another one.
INTERRUPTED = "a call did not reach all layers, or not their end; the cache is of no use any more: reset it"
# Steps for which room is made at most.
MOST_RESERVED = 2**24
FORMS: dict[str, Callable[..., Tensor]] = {"triton": triton.step, "cpp": cpp.step, "torch": torch_step}
UNSUPPORTED: dict[str, Callable[..., str | None]] = {"triton": triton.unsupported, "cpp": cpp.unsupported}
# What "auto" is on devices that have kernels.
DEVICES = {"cuda": "triton", "cpu": "cpp"}


def check_numbers(sequences: Tensor) -> None:
    """Raises ValueError if sequences cannot be chosen by these: a mask would be taken for numbers 0 and 1."""
    if sequences.ndim != 1 or sequences.dtype not in (torch.int64, torch.int32):
        found = f"{sequences.dtype} {list(sequences.shape)}"
        raise ValueError(f"sequences are chosen by their numbers, int64 [new batch], got {found}")


def check_tokens(query: Tensor, new: Tokens, lengths: Tensor | None) -> None:
    """Raises ValueError for what are no tokens of one call; see LayerCache.attend. Compiled code reads what it is told to."""
    if new.key.ndim != 4:
        raise ValueError(f"key must be [batch, seq, kv_heads, head_dim], got {list(new.key.shape)}")
    batch, seq, kv_heads, head_dim = new.key.shape
    if seq == 0:
        raise ValueError("the compressed cache takes in at least one token, got none")
    if query.ndim != 4 or query.shape[:2] != (batch, seq) or query.shape[3] != head_dim or query.shape[2] % kv_heads:
        raise ValueError(
            f"query must be [{batch}, {seq}, heads, {head_dim}] with a multiple of {kv_heads} heads, got {list(query.shape)}"
        )
    turn = (len(new.cos) if len(new.cos) == 1 else batch, seq, 1, head_dim)
    shapes = (new.key.shape, new.key.shape, new.key.shape[:3], new.key.shape[:3], turn, turn)
    for name, x, shape in zip(Tokens._fields, new, shapes, strict=True):
        if x.shape != shape:
            raise ValueError(f"{name} must be {list(shape)}, got {list(x.shape)}")
        if x.device != new.key.device or query.device != new.key.device:
            raise ValueError(f"all tensors must be on one device, got {x.device}, {query.device} and {new.key.device}")
    if new.alpha.dtype != torch.bool:
        raise ValueError(f"alpha must be bool in the cache, got {new.alpha.dtype}")
    if lengths is not None and (lengths.shape != (batch,) or lengths.dtype not in (torch.int64, torch.int32)):
        raise ValueError(f"lengths must be int64 [{batch}], got {lengths.dtype} {list(lengths.shape)}")


class LayerCache:
    """A ring of the last tokens, raw, and the slots of all earlier ones; every head has its own number of slots.

    One thread at a time may use it.

    Args:
        local_window: tokens in the ring. A decision takes effect when its token leaves it.
        operation: what becomes of a token with alpha 1 then.
        window_size: tokens that a slot's mean is truncated to, see DMCConfig.
        clears_last_channel: the last channel of queries and keys is set to zero after the rotation (the ``neuron``
            source).
        page_size: slots that are allocated together.
        cache_dtype: "int8", "fp8" or "int4": kept slots are stored in codes (see codes.py), and attention sees what these give
            back, in a prompt as in single steps. None: in the tokens' dtype.
        backend: what it runs on: "triton" (single steps, and what a chunk leaves), "cpp" (all, on a CPU), "torch", or "auto":
            Triton on a GPU and C++ on a CPU where they can be.
        shared: what the caches of a model's layers know together, by device; an empty dict that all of them are given.
            Every one of them must then take in the same tokens. None: this cache stands alone.
    """

    def __init__(
        self,
        local_window: int = 0,
        operation: Operation = "merge",
        window_size: int | None = None,
        *,
        clears_last_channel: bool = False,
        page_size: int = 16,
        cache_dtype: CacheDtype | None = None,
        backend: str = "auto",
        shared: dict[torch.device, Sequences] | None = None,
    ):
        check_cache_dtype("cache_dtype", cache_dtype)
        self.layout = Layout(local_window, operation, window_size, clears_last_channel, page_size, cache_dtype)
        choose(backend, FORMS)
        if not self.layout.merges and not local_window:
            raise ValueError(
                f"operation {operation} needs local_window >= 1, got 0: a token would be gone before it is seen"
            )
        self.backend = backend
        self.stands_alone = shared is None
        self.shared = {} if shared is None else shared
        self.reset()

    def reset(self) -> None:
        """Forgets everything and frees its memory."""
        self.rows: Rows | None = None
        self.sequences: Sequences | None = None
        self.calls = 0
        if self.stands_alone:
            self.shared.clear()

    @property
    def tokens(self) -> Tensor:
        """Tokens seen of each sequence, int64 [batch]; empty before the first call."""
        if self.sequences is None or self.sequences.tokens is None:
            return torch.zeros(0, dtype=torch.long)
        return self.sequences.tokens

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
            ValueError: shapes, dtypes or devices do not fit together or are not the cache's, lengths are not within the
                tokens, there is no token, gradients are wanted, or an earlier call was interrupted.
        """
        if torch.is_grad_enabled() and any(x.requires_grad for x in (query, key, value, omega)):
            raise ValueError("the compressed cache gives no gradients: use torch.no_grad(), or attend without a cache")
        new = Tokens(key, value, alpha, omega, cos, sin)
        check_tokens(query, new, lengths)
        if self.rows is not None and len(key) != self.rows.batch:
            raise ValueError(f"the cache holds {self.rows.batch} sequences, got {len(key)}; reorder or reset it first")
        if self.rows is not None and key.shape[2:] != (self.rows.kv_heads, self.rows.head_dim):
            held, given = [self.rows.kv_heads, self.rows.head_dim], list(key.shape[2:])
            raise ValueError(f"the cache is another model's: it holds [KV heads, head_dim] {held}, got {given}")
        if self.rows is not None and (key.dtype, key.device) != (self.rows.cells.dtype, self.rows.kept.device):
            holds = f"{self.rows.cells.dtype} on {self.rows.kept.device}"
            raise ValueError(f"the cache holds {holds}, got {key.dtype} on {key.device}; move it, or start a new one")
        scale = 1 / math.sqrt(query.shape[-1]) if softmax_scale is None else softmax_scale
        device = query.device.type
        # Autocast would turn float32 into bf16.
        if torch.amp.is_autocast_available(device) and torch.is_autocast_enabled(device):
            with torch.autocast(device, enabled=False):
                return self._attend(query, new, lengths, scale)
        return self._attend(query, new, lengths, scale)

    def _attend(self, query: Tensor, new: Tokens, lengths: Tensor | None, scale: float) -> Tensor:
        if self.rows is None:
            batch, _, kv_heads, head_dim = new.key.shape
            self.rows = Rows(self.layout, batch, kv_heads, head_dim, like=new.key)
            self.sequences = self.shared.setdefault(new.key.device, Sequences(self.layout))
        rows, sequences = self.rows, self.sequences
        assert sequences is not None
        self._thaw()
        call = sequences.call
        if self.calls == sequences.calls:
            call = sequences.begin(new.cos, new.sin, lengths, rows.batch)
        elif self.calls != sequences.calls - 1 or call is None:
            raise ValueError(INTERRUPTED)
        form = self._form(new.key)
        if form != rows.form:
            # What they have counted lies in different places.
            rows.settle()
            rows.form = form
        # Until all is done: what raises in the middle leaves a cache that has taken in the tokens partly.
        self.calls = -1
        if isinstance(call, Step):
            if not rows.steps:
                assert sequences.tokens is not None
                rows.make_room(sequences.tokens - 1, AHEAD)
            rows.steps -= 1
            at_once = Tokens(*(x[:, 0] for x in new))
            out = FORMS[form](query[:, 0], at_once, rows, call, scale)[:, None].to(query.dtype)
        else:
            assert call is not None
            out = take_in_chunk(query, new, rows, call, scale).to(query.dtype)
        self.calls = sequences.calls
        if self.stands_alone:
            sequences.finish()
        return out

    def _form(self, key: Tensor) -> str:
        wanted = DEVICES.get(key.device.type, "torch") if self.backend == "auto" else self.backend
        reason = UNSUPPORTED[wanted](self.layout, key) if wanted in UNSUPPORTED else None
        if reason and self.backend != "auto":
            raise ValueError(f"the cache cannot run on {wanted}: {reason}; leave backend at auto")
        return "torch" if reason else wanted

    def reserve(self, tokens: int) -> None:
        """Makes room for that many more single steps, so that nothing is allocated or read back from the device meanwhile.

        Raises:
            ValueError: the cache is empty, ``tokens`` is no positive number, other layers have taken several tokens
                in that this one has not, or an earlier call was interrupted.
        """
        if self.rows is None or self.sequences is None or self.sequences.tokens is None:
            raise ValueError("the cache is empty: take the prompt in first")
        if not isinstance(tokens, int) or not 0 < tokens <= MOST_RESERVED:
            raise ValueError(f"room is made for 1 to {MOST_RESERVED} tokens, got {tokens!r}")
        seen = self.sequences.tokens
        if self.calls != self.sequences.calls:
            # Another layer has begun a call already.
            if self.calls != self.sequences.calls - 1 or self.sequences.call is None:
                raise ValueError(INTERRUPTED)
            if not isinstance(self.sequences.call, Step):
                raise ValueError("the layers are taking several tokens in: make room after that")
            seen, tokens = seen - 1, tokens + 1
        self._thaw()
        self.rows.make_room(seen, tokens)

    def select(self, sequences: Tensor) -> None:
        """Sequence i becomes what sequences[i] was. For beam search, repetition, and to free finished sequences.

        Args:
            sequences: [new batch], int64 or int32.

        Raises:
            ValueError: they are no such numbers; a mask is none.
        """
        check_numbers(sequences)
        if self.rows is None or len(sequences) == 0:
            return self.reset()
        sequences = sequences.to(self.tokens.device)
        self.rows.select(sequences)
        if self.stands_alone and self.sequences is not None:
            self.sequences.select(sequences)

    @property
    def slots(self) -> Tensor:
        """Slots in use; open and residual ones and the ring's tokens count: int64 [batch, kv_heads]."""
        if self.rows is None:
            return torch.zeros(0, 1, dtype=torch.long)
        slots = self.rows.count + self.tokens.clamp(max=self.layout.local_window)[:, None]
        return slots + (self.rows.residual_state.mass > 0) if self.layout.absorbs else slots

    @property
    def nbytes(self) -> int:
        """Bytes held: cells with their unused slots and tables, sums, decisions; what layers share only if it stands
        alone."""
        if self.rows is None or self.sequences is None:
            return 0
        return bytes_of(*self.holders()[: None if self.stands_alone else -1])

    def holders(self) -> list[Any]:
        """Whose attributes its tensors are; what layers share comes last."""
        rows = self.rows
        assert rows is not None
        ahead = [] if rows.ahead is None else [rows.ahead]
        pages = [each.pages for each in ahead if each.pages is not None]
        return [rows, rows.cells, *ahead, *pages, self.sequences]

    def to(self, device: torch.device | str) -> "LayerCache":
        """Moves everything to a device, what layers share with the first of them, and returns itself."""
        if self.rows is not None and self.sequences is not None:
            self.rows.settle()
            for holder in (self.rows, self.rows.cells):
                change_tensors(holder, lambda x: x.to(device))
            moved = copy.copy(self.sequences)
            change_tensors(moved, lambda x: x.to(device))
            self._share(moved)
        return self

    def state_dict(self) -> dict[str, Any]:
        """Everything, as tensors, numbers and strings: what torch.save writes and torch.load reads with weights_only.

        The tensors are the cache's own; an empty cache has its layout only.

        Raises:
            ValueError: a call was interrupted.
        """
        state: dict[str, Any] = {"layout": asdict(self.layout)}
        if self.rows is not None and self.sequences is not None:
            if self.calls != self.sequences.calls:
                raise ValueError(INTERRUPTED)
            self.rows.settle()
            state["kv_heads"], state["head_dim"] = self.rows.kv_heads, self.rows.head_dim
            for name, holder in (("rows", self.rows), ("cells", self.rows.cells), ("sequences", self.sequences)):
                state[name] = tensors(holder)
        return state

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        """Becomes what :meth:`state_dict` gave, with tensors of its own; on the device where the given ones are.

        Raises:
            ValueError: it is of another layout, or damaged, or has seen other tokens than those it shares with.
        """
        if not isinstance(state, Mapping):
            raise ValueError(f"this is no saved cache, but of type {type(state).__name__}; save its state_dict()")
        # Versions before this one knew no codes.
        layout = {"cache_dtype": None, **state["layout"]} if isinstance(state.get("layout"), Mapping) else None
        if layout != asdict(self.layout):
            raise ValueError(f"the saved cache has another layout: {layout}, here {asdict(self.layout)}")
        self.reset()
        if "rows" in state:
            self.rows, sequences = restored(self.layout, state)
            self._share(sequences)
            assert self.sequences is not None
            self.calls = self.sequences.calls

    def _share(self, sequences: Sequences) -> None:
        """The layers on a device know these together, or those that the first of them has brought."""
        if self.stands_alone:
            self.shared.clear()
        assert self.rows is not None and sequences.tokens is not None
        known = self.shared.setdefault(self.rows.kept.device, sequences)
        if known.tokens is None or not torch.equal(known.tokens, sequences.tokens):
            raise ValueError("the layers of a cache have seen different tokens: they are not of one model's call")
        self.sequences = known

    def _thaw(self) -> None:
        """Nothing can be written to tensors of the inference mode outside it: they are copied."""
        if torch.is_inference_mode_enabled() or self.rows is None:
            return
        if any(x.is_inference() for holder in self.holders() for x in tensors(holder).values()):
            self.rows.settle()
            for holder in self.holders():
                change_tensors(holder, Tensor.clone)
