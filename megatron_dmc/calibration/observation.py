"""What one layer of the base shows of its tokens: the decisions' inputs, and how much each token is attended later."""

import math
from typing import Any, NamedTuple

import torch
from megatron.core.tensor_parallel import gather_from_sequence_parallel_region
from torch import Tensor

from megatron_dmc.model.attention import BaseAttention, DMCSelfAttention
from megatron_dmc.model.compression_loss import takes_effect
from megatron_dmc.ops.later_attention import Tokens, later_attention
from megatron_dmc.ops.later_attention.context_parallel import context_parallel_later_attention
from megatron_dmc.ops.matrix_product import matrix_product
from megatron_dmc.recipe.sections import UNSEEN_PART

# A score below this one is as good as none.
LEAST_SHARE = 1e-8


class Observation(NamedTuple):
    """This rank's tokens and KV heads of one layer.

    Attributes:
        hidden_states: the decisions' inputs, float32 [batch, seq, hidden].
        scores: logarithms, float32 [batch, seq, kv_heads], see later_attention.
        learns: bool [batch or 1, seq], whose scores are to be learned: later queries have been seen, and they count.
        in_effect: bool [batch or 1, seq], whose decisions take effect within their text.
    """

    hidden_states: Tensor
    scores: Tensor
    learns: Tensor
    in_effect: Tensor


class StateNorm:
    """Remembers the norms of the hidden states that came into a layer: its attention's output is added to them."""

    def __init__(self, input_layernorm: torch.nn.Module) -> None:
        self._norm: Tensor | None = None
        self._hook = input_layernorm.register_forward_hook(self._remember)

    def _remember(self, module: torch.nn.Module, inputs: Any, output: Any) -> None:
        self._norm = inputs[0].float().norm(dim=-1)

    @property
    def last(self) -> Tensor:
        """Of the last forward pass, [seq (/ tensor-parallel ranks), batch]."""
        assert self._norm is not None
        return self._norm

    def remove(self) -> None:
        self._hook.remove()


def observe(layer: DMCSelfAttention, attention: BaseAttention, state_norm: Tensor) -> Observation:
    """One micro-batch of the base's attention as an observation.

    Args:
        layer: whose attention it is.
        state_norm: of the hidden states that came into the layer, [seq (/ tensor-parallel ranks), batch].
    """
    assert layer.dmc is not None
    window = layer.dmc.local_window
    hidden_states, norm = (_whole(x, layer) for x in (attention.hidden_states, state_norm[..., None]))
    places = attention.places
    device = attention.query.device
    in_document, remaining = places.in_document.to(device), places.remaining.to(device)
    documents = None
    if places.documents is not None:
        documents = places.documents.number.view(len(attention.query), -1).to(device)
    positions = places.positions.to(device)
    queries = Tokens(attention.query, norm[..., 0].clamp(min=1e-30).log(), positions, documents)
    value_norms = _value_norms(layer, attention.value).clamp(min=1e-30).log()
    keys = Tokens(attention.key, value_norms, positions, documents)
    settings: dict[str, Any] = {"local_window": window, "softmax_scale": layer.core_attention.softmax_scale}
    if layer.context_group is None:
        scores = later_attention(queries, keys, **settings)
    else:
        group = layer.context_group
        scores = context_parallel_later_attention(queries, keys, documents=documents, group=group, **settings)
    length = in_document + remaining + 1
    return Observation(
        hidden_states,
        scores.clamp(min=math.log(LEAST_SHARE)),
        (in_document > 0) & (remaining >= window) & (remaining >= length // UNSEEN_PART),
        takes_effect(in_document, remaining, window),
    )


def _whole(x: Tensor, layer: DMCSelfAttention) -> Tensor:
    """[seq (/ tensor-parallel ranks), batch, ...] -> float32 [batch, seq, ...] with all tokens of this context rank."""
    if layer.config.sequence_parallel:
        x = gather_from_sequence_parallel_region(x, group=layer.pg_collection.tp)
    return x.transpose(0, 1).float()


def _value_norms(layer: DMCSelfAttention, value: Tensor) -> Tensor:
    """The norm of what every query head adds to the hidden state for a value that it attends to alone.

    ‖W_h v‖ by way of the Gram matrices W_h' W_h, which are small: float32 [batch, seq, heads].
    """
    kv_heads, head_dim = value.shape[2:]
    output = layer.linear_proj.weight.detach().float().unflatten(1, (-1, head_dim))  # [hidden, heads, head_dim]
    gram = matrix_product(output.permute(1, 2, 0), output.permute(1, 0, 2)).unflatten(0, (kv_heads, -1))
    wide = value.float()
    square = torch.einsum("bskd,kgde,bske->bskg", wide, gram, wide)
    return square.clamp(min=0).sqrt().flatten(2)
