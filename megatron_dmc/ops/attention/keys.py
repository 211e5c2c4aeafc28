"""The keys of a whole sequence, and the sums of their gradients over all parts of it that see them."""

from typing import NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor

from megatron_dmc.ops.attention.fading_keys import FarGradients, FarKeys
from megatron_dmc.ops.attention.one_key import OneKey
from megatron_dmc.ops.attention.types import BiasedKeys, Form, States
from megatron_dmc.ops.residual import Residual
from megatron_dmc.ops.residual.torch import residual_backward, residual_forward


class Keys(NamedTuple):
    """A whole sequence's keys.

    Attributes:
        key, value: raw, [batch, seq, kv_heads, head_dim]; None: there is no window.
        far_key, far_value: what tokens outside the window have become: slots, or without ``merge`` the raw ones.
        fade_logits: [batch, seq, kv_heads]; a far key counts 1 - sigmoid(fade_logits) times for all queries but its own
            slot's. None: no key fades.
        mean_key, mean_value, log_mass: the residual slot after each token has left the window, see ``Residual``; None: tokens
            are not absorbed.
    """

    key: Tensor | None
    value: Tensor | None
    far_key: Tensor
    far_value: Tensor
    fade_logits: Tensor | None
    mean_key: Tensor | None = None
    mean_value: Tensor | None = None
    log_mass: Tensor | None = None

    def near(self, part: slice) -> BiasedKeys:
        """Raw keys of these tokens."""
        assert self.key is not None and self.value is not None
        return BiasedKeys(self.key[:, part], self.value[:, part], None)

    def far(self, part: slice | Tensor) -> FarKeys:
        """Far keys of these tokens."""
        fade_logits = None if self.fade_logits is None else self.fade_logits[:, part]
        return FarKeys(self.far_key[:, part], self.far_value[:, part], fade_logits)

    def residual(self, part: slice | Tensor) -> OneKey:
        """The residual slot after each of these tokens has left the window, for the query whose turn that is."""
        assert self.mean_key is not None and self.mean_value is not None and self.log_mass is not None
        return OneKey(self.mean_key[:, part], self.mean_value[:, part], self.log_mass[:, part])


def keys_of(states: States, form: Form) -> Keys:
    """The keys among attention's arguments. Without slots the raw keys are the far ones too."""
    key, value, far_key, far_value = states[1:5]
    absorbed = _Absorbed.of(states, form)
    if far_key is None or far_value is None:
        assert key is not None and value is not None
        far_key, far_value = key, value
    if form.local_window == 0:
        key = value = None
    fade_logits = None
    if states.merge_logits is not None:
        after_first = states.merge_logits.to(torch.promote_types(far_key.dtype, torch.float32))[:, 1:]
        if form.operation == "merge":  # a slot fades when the next token merges into it; nothing comes after the last
            fade_logits = F.pad(after_first, (0, 0, 0, 1), value=float("-inf"))
        else:  # a token fades when it is evicted itself; the first one never is
            fade_logits = F.pad(after_first, (0, 0, 1, 0), value=float("-inf"))
    keys = Keys(key, value, far_key, far_value, fade_logits)
    if absorbed is None:
        return keys
    residual, _ = residual_forward(absorbed.key, absorbed.value, absorbed.weight, absorbed.starts)
    return keys._replace(**residual._asdict())


class _Absorbed(NamedTuple):
    """What the residual slot of whole sequences is made of.

    Attributes:
        key, value: raw, the key rotated.
        alpha, keep, omega: the token's share that is absorbed, 1 - that, and its weight; [batch, seq, kv_heads].
        starts: bool [batch, seq], the first token of a document, which is never absorbed; None: rows of one document each.
    """

    key: Tensor
    value: Tensor
    alpha: Tensor
    keep: Tensor
    omega: Tensor
    starts: Tensor | None

    @classmethod
    def of(cls, states: States, form: Form) -> "_Absorbed | None":
        """None: the form absorbs nothing."""
        if form.operation != "absorb":
            return None
        key, value, logits, omega = states.key, states.value, states.merge_logits, states.omega
        assert key is not None and value is not None and logits is not None and omega is not None
        logits, omega = (x.to(torch.promote_types(key.dtype, torch.float32)) for x in (logits, omega))
        documents = form.kernel.documents
        starts = None if documents is None else documents.starts.view(key.shape[:2])
        # 1 - alpha as a sigmoid of its own: the difference has no digits left where alpha is near 1.
        return cls(key, value, torch.sigmoid(logits), torch.sigmoid(-logits), omega, starts)

    @property
    def weight(self) -> Tensor:
        return self.alpha * self.omega


class KeyGradients:
    """Gradients of ``keys``, summed over all parts of a sequence that see them; ``dtype`` None: the keys' own."""

    def __init__(self, keys: Keys, form: Form, dtype: torch.dtype | None = None) -> None:
        self.keys, self.form, self.operation = keys, form, form.operation
        self.far_key, self.far_value = _Sum(keys.far_key, dtype), _Sum(keys.far_value, dtype)
        self.key, self.value = self.far_key, self.far_value
        # Evicted keys are the raw ones: they have one gradient.
        if keys.key is not None and keys.value is not None and form.operation == "merge":
            self.key, self.value = _Sum(keys.key, dtype), _Sum(keys.value, dtype)
        self.fade_logits = None if keys.fade_logits is None else _Sum(keys.fade_logits, None)
        # Of mean_key, mean_value, log_mass.
        self.after_each: list[_Sum] = []
        if keys.mean_key is not None and keys.mean_value is not None and keys.log_mass is not None:
            self.after_each = [_Sum(keys.mean_key, dtype), _Sum(keys.mean_value, dtype), _Sum(keys.log_mass, None)]

    def add_near(self, key: Tensor, value: Tensor, at: slice) -> None:
        self.key.add(key, at)
        self.value.add(value, at)

    def add_far(self, gradients: FarGradients, at: slice | Tensor) -> None:
        self.far_key.add(gradients.key, at)
        self.far_value.add(gradients.value, at)
        if self.fade_logits is not None and gradients.fade_logits is not None:
            self.fade_logits.add(gradients.fade_logits, at)

    def residual(self, at: slice | Tensor) -> OneKey:
        """What gradients of the residual slot after these tokens are added to in place, before ``add_residual``."""
        key, value, log_mass = (total.result()[:, at] for total in self.after_each)
        # A selection is a copy, which add_residual writes back; a slice is the sum itself.
        return OneKey(key, value, log_mass)

    def add_residual(self, gradients: OneKey, at: slice | Tensor) -> None:
        """Gradients of key and value are those that ``residual`` gave, added to; that of log_weight is added here."""
        key, value, log_mass = (total.result() for total in self.after_each)
        if isinstance(at, Tensor):
            key[:, at], value[:, at] = gradients.key, gradients.value
        log_mass[:, at] += gradients.log_weight

    def add_rows(self, others: "KeyGradients", at: slice) -> None:
        """Gradients of all rows' tokens ``at``, which lie one after another: [1, batch * tokens, ...]."""
        pairs = {id(own): (own, other) for own, other in zip(self._all(), others._all(), strict=True)}
        for own, other in pairs.values():
            own.add(other.result().view(own.like.shape[0], -1, *own.like.shape[2:]), at)

    def of(self, states: States) -> tuple[Tensor | None, ...]:
        """Gradients of all states but the query, of each that was given: the adjoint of keys_of.

        Args:
            states: what keys_of was given.
        """
        d_merge_logits = None
        if states.merge_logits is not None and self.fade_logits is not None:
            # The adjoint of the padding; the first token's logit is never read.
            kept = slice(None, -1) if self.operation == "merge" else slice(1, None)
            d_merge_logits = F.pad(self.fade_logits.result()[:, kept], (0, 0, 1, 0)).to(states.merge_logits.dtype)
        d_omega = None
        absorbed = _Absorbed.of(states, self.form)
        if absorbed is not None and states.omega is not None and d_merge_logits is not None:
            d_key, d_value, d_weight = self._of_absorbed(absorbed)
            self.key.result().add_(d_key)
            self.value.result().add_(d_value)
            d_merge_logits += d_weight * absorbed.weight * absorbed.keep
            d_omega = (d_weight * absorbed.alpha).to(states.omega.dtype)
        return (
            *((None, None) if states.key is None else (self.key.result(), self.value.result())),
            *((None, None) if states.far_key is None else (self.far_key.result(), self.far_value.result())),
            d_merge_logits,
            d_omega,
        )

    def _of_absorbed(self, absorbed: _Absorbed) -> tuple[Tensor, Tensor, Tensor]:
        """Gradients of key, value and weight."""
        after_each = Residual(*self.keys[-3:])  # type: ignore[arg-type]
        grads = Residual(*(x.result() for x in self.after_each))
        tensors = absorbed.key, absorbed.value, absorbed.weight, absorbed.starts
        return residual_backward(grads, *tensors, after_each)[:3]

    def _all(self) -> list["_Sum"]:
        sums = [self.far_key, self.far_value, self.key, self.value, *self.after_each]
        return sums if self.fade_logits is None else [*sums, self.fade_logits]


class _Sum:
    """Adds up gradients of parts of a sequence. The first part is taken as it is if it is the whole."""

    def __init__(self, like: Tensor, dtype: torch.dtype | None) -> None:
        self.like, self.dtype = like, dtype or like.dtype
        self.total: Tensor | None = None

    def add(self, part: Tensor, at: slice | Tensor) -> None:
        """``at``: which of the sequence's tokens, none of them twice."""
        if self.total is None and part.shape == self.like.shape and part.dtype == self.dtype:
            self.total = part
            return
        self.result()[:, at] += part

    def result(self) -> Tensor:
        if self.total is None:
            self.total = torch.zeros_like(self.like, dtype=self.dtype, memory_format=torch.contiguous_format)
        return self.total
