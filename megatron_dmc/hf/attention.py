"""The attention of a Hugging Face model whose keys and values merge into slots."""

from typing import Any

from torch import Tensor, nn

from megatron_dmc.hf.cache import DMCCache
from megatron_dmc.ops.attention import windowed_dmc_attention
from megatron_dmc.ops.decisions import (
    clear_channel,
    hard_merge_logits,
    neuron_logits,
    omega_from_logits,
    omega_of_absorbed,
    projection_logits,
)
from megatron_dmc.ops.head_norm import head_norm
from megatron_dmc.ops.states import attention_states
from megatron_dmc.ops.tokens import Tokens


class DecisionProjection(nn.Linear):
    """W and beta of the `projection` source, rows (a_0, b_0, a_1, b_1, ...); zero at first, so that nothing merges."""


class DMCAttention(nn.Module):
    """Stands before a family's attention among the bases of a class. Decisions are binary, also in training mode.

    The family's own class makes the projections and, where it has them, the norms of queries and keys.
    """

    q_proj: nn.Module
    k_proj: nn.Module
    v_proj: nn.Module
    o_proj: nn.Module
    q_norm: Any
    k_norm: Any
    head_dim: int

    def __init__(self, config: Any, layer_idx: int):
        super().__init__(config, layer_idx)
        self.layer_idx = layer_idx
        self.dmc = config.dmc
        self.neuron = config.dmc["decision_source"] == "neuron"
        self.absorbs = config.dmc["operation"] == "absorb"
        if not self.neuron:
            self.decision = DecisionProjection(config.hidden_size, 2 * config.num_key_value_heads)

    def forward(
        self,
        hidden_states: Tensor,
        position_embeddings: tuple[Tensor, Tensor],
        attention_mask: Tensor | None = None,
        lengths: Tensor | None = None,
        dmc_cache: DMCCache | None = None,
        merge_threshold: float | Tensor = 0.0,
        **_: Any,
    ) -> tuple[Tensor, None]:
        """As the family's attention. No mask is looked at: attention is causal, and padding is at the end.

        Args:
            hidden_states: [batch, seq, hidden] (normed).
            position_embeddings: cos and sin, [batch or 1, seq, head_dim].
            lengths: real tokens of each row, int64 [batch]; None: all are.
            dmc_cache: the model's, which takes the tokens in.
            merge_threshold: logits, above which a token merges; a number, or one for each row, [batch, 1, 1].

        Returns:
            [batch, seq, hidden], and None for the weights, which are never stored.
        """
        cos, sin = (x[:, :, None] for x in position_embeddings)
        query, key, value = (
            projection(hidden_states).unflatten(-1, (-1, self.head_dim))
            for projection in (self.q_proj, self.k_proj, self.v_proj)
        )
        biases = self.dmc["decision_bias"], 0.0 if self.absorbs else self.dmc["decision_bias"]
        if self.neuron:
            decision_logits, omega_logits = neuron_logits(query, key, *biases)
            query, key = self._normed(clear_channel(query), clear_channel(key))
        else:
            decision_logits, omega_logits = projection_logits(
                self.decision(hidden_states), *biases, self.dmc["decision_scale"]
            )
            query, key = self._normed(query, key)
        if self.dmc["per_layer"]:
            decision_logits = decision_logits.mean(-1, keepdim=True).expand_as(decision_logits)
        alpha = decision_logits > merge_threshold
        if self.absorbs:
            omega = omega_of_absorbed(omega_logits)
        else:
            omega = omega_from_logits(omega_logits, self.dmc["omega_floor"])
        if dmc_cache is not None:
            out = dmc_cache.layers[self.layer_idx].attend(query, key, value, alpha, omega, cos, sin, lengths=lengths)
        else:
            # Padding comes after the real tokens, where causal attention never looks.
            when = {"local_window": self.dmc["local_window"], "operation": self.dmc["operation"]}
            states = attention_states(
                query,
                Tokens(key, value, alpha.to(decision_logits.dtype), omega, cos, sin),
                window_size=self.dmc["window_size"],
                clear_last_channel=self.neuron,
                **when,
            )
            out = windowed_dmc_attention(
                *states,
                hard_merge_logits(decision_logits, merge_threshold),
                omega=omega if self.absorbs else None,
                bias_channel=-1 if self.neuron else None,
                **when,
            )
        return self.o_proj(out.flatten(2)), None

    def _normed(self, query: Tensor, key: Tensor) -> tuple[Tensor, Tensor]:
        """Query and key after the family's norms of heads, if it has them; the decisions' own channel has no say in them."""
        if not hasattr(self, "q_norm"):
            return query, key
        if not self.neuron:
            return self.q_norm(query), self.k_norm(key)
        query = head_norm(query, self.q_norm.weight, self.q_norm.variance_epsilon, last_channel=0.0)
        return query, head_norm(key, self.k_norm.weight, self.k_norm.variance_epsilon, last_channel=0.0)
