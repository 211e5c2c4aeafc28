"""Self-attention whose keys and values are merged into slots, as a megatron-core module."""

from collections.abc import Callable
from dataclasses import dataclass
from functools import partial
from typing import Any, Literal, NamedTuple, cast

import torch
import torch.distributed as dist
import torch.nn.functional as F
from megatron.core import tensor_parallel
from megatron.core.transformer.attention import SelfAttention, SelfAttentionSubmodules
from megatron.core.transformer.module import MegatronModule
from megatron.core.transformer.transformer_config import TransformerConfig
from torch import Tensor

from megatron_dmc.config import DMCConfig
from megatron_dmc.model.compression_loss import (
    CompressionLoss,
    DecisionStatistics,
    OffsetSlopes,
    count_decisions,
    takes_effect,
)
from megatron_dmc.model.decision_projection import DecisionProjection
from megatron_dmc.model.documents import TokenPlaces, token_places
from megatron_dmc.ops.attention import Documents, causal_attention, windowed_dmc_attention
from megatron_dmc.ops.attention.context_parallel import context_parallel_attention
from megatron_dmc.ops.decisions import (
    clear_channel,
    hard_merge_logits,
    neuron_logits,
    omega_from_logits,
    omega_of_absorbed,
    projection_logits,
    relaxed_merge_logits,
)
from megatron_dmc.ops.noise import logistic_noise
from megatron_dmc.ops.pooling import pool
from megatron_dmc.ops.pooling.context_parallel import context_parallel_pool
from megatron_dmc.ops.rotary import rotate, rotation
from megatron_dmc.ops.states import attention_states
from megatron_dmc.ops.tokens import Tokens


@dataclass(frozen=True)
class StepContext:
    """What is constant during one training step. The trainer sets it between steps, so recomputation sees the same.

    Attributes:
        merging: decisions are made and take effect. False: the base model.
        channel_scale: factor on the last channel of q and k before and after rotary embedding (phase zero_out).
        alpha_gradient: what every alpha gets, the slope of the step's compression loss or minus the multiplier.
        uncounted: int64, numbers of samples whose decisions are not counted; None: all are.
        merge_threshold: logits, above which a token merges, not in training.
    """

    merging: bool = True
    channel_scale: float = 1.0
    alpha_gradient: float = 0.0
    uncounted: Tensor | None = None
    merge_threshold: float = 0.0


class BaseAttention(NamedTuple):
    """What one layer's attention is computed from where nothing merges; of this rank's tokens and heads.

    Attributes:
        hidden_states: normed, [seq, batch, hidden]; under sequence parallelism this rank's part of seq.
        query: [batch, seq, heads, head_dim], rotated.
        key, value: [batch, seq, kv_heads, head_dim], the key rotated.
        places: of the tokens.
    """

    hidden_states: Tensor
    query: Tensor
    key: Tensor
    value: Tensor
    places: TokenPlaces


class DMCCoreAttention(MegatronModule):
    """Causal attention on rotated [batch, seq, heads, head_dim]: plain, or over slot states when there are merge logits.

    Under context parallelism it runs on this rank's two chunks of the sequence. ``cp_comm_type`` is how ranks exchange keys:
    ``all_gather``, the default, or ``a2a`` (see ``context_parallel_attention``).
    """

    def __init__(
        self,
        config: TransformerConfig,
        *,
        softmax_scale: float | None = None,
        dmc: DMCConfig | None = None,
        cp_comm_type: str | None = None,
        pg_collection: Any = None,
        **_: Any,
    ) -> None:
        super().__init__(config=config)
        self.softmax_scale = softmax_scale
        self.dmc = dmc
        self.group = _context_group(config, pg_collection)
        if self.group is not None and cp_comm_type not in (None, "all_gather", "a2a"):
            raise NotImplementedError(f"cp_comm_type must be all_gather or a2a, got {cp_comm_type!r}")
        self.exchange = cast(Literal["all_gather", "a2a"], cp_comm_type or "all_gather")

    def forward(
        self, query: Tensor, key: Tensor, value: Tensor, *decided: Tensor, documents: Documents | None = None
    ) -> Tensor:
        """``decided``: pooled_key, pooled_value and merge_logits, and omega where tokens are absorbed; nothing: plain."""
        given: list[Tensor | None] = [*decided, None, None, None, None]
        pooled_key, pooled_value, merge_logits, omega = given[:4]
        settings: dict[str, Any] = {"softmax_scale": self.softmax_scale}
        if self.dmc is not None and merge_logits is not None:
            settings["local_window"], settings["operation"] = self.dmc.local_window, self.dmc.operation
            settings["bias_channel"] = -1 if self.dmc.uses_key_channel else None
            settings["omega"] = omega
        if self.group is not None:
            states = query, key, value, pooled_key, pooled_value, merge_logits
            settings |= {"group": self.group, "exchange": self.exchange}
            return context_parallel_attention(*states, documents=documents, **settings)
        if pooled_key is not None and pooled_value is not None and merge_logits is not None:
            states = query, key, value, pooled_key, pooled_value, merge_logits
            return windowed_dmc_attention(*states, document_starts=documents, **settings)
        if documents is not None:
            return causal_attention(query, key, value, document_starts=documents, **settings)
        out = F.scaled_dot_product_attention(
            query.transpose(1, 2),
            key.transpose(1, 2),
            value.transpose(1, 2),
            is_causal=True,
            scale=self.softmax_scale,
            enable_gqa=query.shape[2] != key.shape[2],
        )
        return out.transpose(1, 2)


class DMCSelfAttention(SelfAttention):
    """SelfAttention with Dynamic Memory Compression (paper, section 3).

    ``attention_mask`` carries no mask, because attention is causal and no s x s mask is ever built. In training it carries
    the global sample indices, int64 [batch], that choose the decisions' noise: megatron-core hands this argument to every
    layer and every pipeline stage, through activation checkpointing too. ``packed_seq_params`` holds packed documents (see
    ``pack_documents``): nothing merges and nothing attends across their boundaries.

    Args:
        dmc: None for the base model: plain causal attention, no new parameters.
    """

    def __init__(
        self,
        config: TransformerConfig,
        submodules: SelfAttentionSubmodules,
        *,
        dmc: DMCConfig | None = None,
        **settings: Any,
    ) -> None:
        # The other settings are for megatron-core, which adds to them from version to version.
        super().__init__(config, submodules, **settings)
        if config.qk_layernorm != (self.q_layernorm is not None):
            raise ValueError(
                f"qk_layernorm is {config.qk_layernorm} in the configuration and {not config.qk_layernorm} in the layer spec; "
                "give get_dmc_layer_spec the same"
            )
        self.dmc = dmc
        self.step = StepContext()
        self.statistics = DecisionStatistics()
        # Sees what the base's attention is made of, where nothing merges.
        self.observer: Callable[[BaseAttention], None] | None = None
        # The ranks that share a sequence; None: this rank has all of it.
        self.context_group = _context_group(config, self.pg_collection)
        rank = self.pg_collection.tp.rank()
        heads = self.num_query_groups_per_partition
        # Global numbers of this rank's KV heads.
        self.kv_heads = range(rank * heads, (rank + 1) * heads)
        if dmc is not None and dmc.has_projection:
            self.decision = DecisionProjection(config, self.pg_collection.tp)

    def forward(
        self,
        hidden_states: Tensor,
        attention_mask: Tensor | None,
        key_value_states: Tensor | None = None,
        inference_context: Any = None,
        rotary_pos_emb: Tensor | tuple[Tensor, Tensor] | None = None,
        rotary_pos_cos: Tensor | None = None,
        rotary_pos_sin: Tensor | None = None,
        rotary_pos_cos_sin: Tensor | None = None,
        attention_bias: Tensor | None = None,
        packed_seq_params: Any = None,
        sequence_len_offset: int | None = None,
        *,
        inference_params: Any = None,
    ) -> tuple[Tensor, Tensor | None]:
        """hidden_states [seq, batch, hidden] (normed) -> output [seq, batch, hidden] and its bias (None)."""
        if attention_bias is not None or key_value_states is not None:
            raise NotImplementedError("DMC attention takes no attention bias and no cross-attention")
        if rotary_pos_emb is None:
            raise NotImplementedError("DMC attention needs rotary position embedding")
        if inference_context is not None and (self.context_group is not None or packed_seq_params is not None):
            raise NotImplementedError("the compressed cache takes no packed sequences and no context parallelism")
        query, key, value = (x.transpose(0, 1) for x in self.get_query_key_value_tensors(hidden_states))
        angles = (rotary_pos_emb[0] if isinstance(rotary_pos_emb, tuple) else rotary_pos_emb).transpose(0, 1)
        places = token_places(packed_seq_params, len(query), query.shape[1], self.context_group)
        if places.documents is not None:
            angles = angles[0, places.in_document.to(angles.device)]

        if self.dmc is None or not self.step.merging:
            if inference_context is not None:
                raise NotImplementedError("the compressed cache needs a model that merges")
            cos, sin = rotation(angles, query.dtype)
            query, key = self._normed(query, key, self.step.channel_scale)
            query, key = (self._scaled_rotation(x, cos, sin) for x in (query, key))
            if self.observer is not None:
                self.observer(BaseAttention(hidden_states, query, key, value, places))
            out = self._attend(query, key, value, documents=places.documents)
        else:
            decision_logits, omega_logits = self.decision_logits(hidden_states, query, key)
            if self.dmc.absorbs:
                omega = omega_of_absorbed(omega_logits)
            else:
                omega = omega_from_logits(omega_logits, self.dmc.omega_floor)
            if self.dmc.uses_key_channel:
                query, key = self._normed(clear_channel(query), clear_channel(key), 0.0)
            else:
                query, key = self._normed(query, key)
            if inference_context is not None:
                # The angles are those of all positions: the context knows which are the tokens'.
                out = inference_context.attend(
                    self.layer_number, query, key, value, decision_logits, omega, angles=angles
                )
            else:
                in_effect = takes_effect(places.in_document, places.remaining, self.dmc.local_window)
                in_effect = in_effect.to(value.device, non_blocking=True)
                merge_logits = self._merge_logits(decision_logits, attention_mask, places)
                if self.training and self.dmc.ratio_control == "offset":
                    merge_logits = OffsetSlopes.apply(merge_logits, in_effect, self.statistics)
                alpha = torch.sigmoid(merge_logits)
                value = self._count(value, alpha, merge_logits, decision_logits, in_effect, attention_mask)
                tokens = Tokens(key, value, alpha, omega, *rotation(angles, query.dtype))
                out = self._merge_and_attend(query, tokens, merge_logits, places)
        out = out.transpose(0, 1).flatten(2)
        if not self.linear_proj.weight.requires_grad:
            # Tokens in another order times a frozen weight would be one small product per token.
            out = out.contiguous()
        return self.linear_proj(out)

    def decision_logits(self, hidden_states: Tensor, query: Tensor, key: Tensor) -> tuple[Tensor, Tensor]:
        """decision_logits, in use above their threshold, and omega_logits, [batch, seq, kv_heads], from query and key before
        their norm."""
        assert self.dmc is not None
        biases = self.dmc.decision_bias, self.dmc.omega_bias
        if self.dmc.uses_key_channel:
            decision_logits, omega_logits = neuron_logits(query, key, *biases)
        else:
            projected, _ = self.decision(hidden_states)
            decision_logits, omega_logits = projection_logits(
                projected.transpose(0, 1), *biases, self.dmc.decision_scale
            )
            decision_logits = decision_logits + self.decision.offset
        if self.dmc.per_layer:
            # Summed over the tensor-parallel ranks, forward and backward.
            total = tensor_parallel.reduce_from_tensor_model_parallel_region(decision_logits.sum(-1, keepdim=True))
            total = tensor_parallel.copy_to_tensor_model_parallel_region(total)
            decision_logits = (total / self.config.num_query_groups).expand_as(decision_logits)
        if not self.training:
            decision_logits = decision_logits - self.step.merge_threshold
        return decision_logits, omega_logits

    def _merge_logits(self, decision_logits: Tensor, sample_index: Tensor | None, places: TokenPlaces) -> Tensor:
        """[batch, seq, kv_heads]: noisy in training, binary (±inf) in evaluation."""
        assert self.dmc is not None
        if not self.training:
            return hard_merge_logits(decision_logits)
        batch = decision_logits.shape[:1]
        if sample_index is None or sample_index.dtype != torch.int64 or sample_index.shape != batch:
            raise ValueError(
                "in training, attention_mask must carry the global sample indices, int64 [batch], for the decisions' noise"
            )
        # With per_layer one decision serves all heads, and so does one noise.
        heads = range(1) if self.dmc.per_layer else self.kv_heads
        noise = logistic_noise(self.dmc.seed, sample_index, self.layer_number - 1, heads, places.positions)
        return relaxed_merge_logits(decision_logits, noise, self.dmc.temperature)

    def _count(
        self,
        value: Tensor,
        alpha: Tensor,
        merge_logits: Tensor,
        decision_logits: Tensor,
        in_effect: Tensor,
        sample_index: Tensor | None,
    ) -> Tensor:
        """Counts the decisions, in training in the backward pass of the value that is returned."""
        samples = None
        if self.step.uncounted is not None and sample_index is not None:
            samples = ~torch.isin(sample_index, self.step.uncounted)
        counts = count_decisions(merge_logits.detach(), decision_logits.detach(), in_effect, samples)
        if not self.training:
            self.statistics.add(counts)
            return value
        counted = alpha.masked_fill(~in_effect[..., None], 0)
        return CompressionLoss.apply(value, counted, counts, self.statistics, self.step.alpha_gradient)

    def _merge_and_attend(self, query: Tensor, tokens: Tokens, merge_logits: Tensor, places: TokenPlaces) -> Tensor:
        assert self.dmc is not None
        states = attention_states(
            query,
            tokens,
            local_window=self.dmc.local_window,
            operation=self.dmc.operation,
            window_size=self.dmc.window_size,
            clear_last_channel=self.dmc.uses_key_channel,
            document_starts=places.starts,
            merge=pool if self.context_group is None else partial(context_parallel_pool, group=self.context_group),
        )
        weights = (tokens.omega,) if self.dmc.absorbs else ()
        return self._attend(*states, merge_logits, *weights, documents=places.documents)

    def _normed(self, query: Tensor, key: Tensor, last_channel: float = 1.0) -> tuple[Tensor, Tensor]:
        """Query and key after the norms of their heads, if this family has them; see ``head_norm`` for ``last_channel``."""
        if self.q_layernorm is None:
            return query, key
        return self.q_layernorm.norm(query, last_channel), self.k_layernorm.norm(key, last_channel)

    def _scaled_rotation(self, x: Tensor, cos: Tensor, sin: Tensor) -> Tensor:
        """Rotary embedding, with the last channel scaled before and after it in phase zero_out."""
        if self.step.channel_scale == 1.0:
            return rotate(x, cos, sin)
        scale = F.pad(x.new_ones(x.shape[-1] - 1), (0, 1), value=self.step.channel_scale)
        return rotate(x * scale, cos, sin) * scale

    def _attend(self, *tensors: Tensor, documents: Documents | None) -> Tensor:
        attend = self.core_attention if documents is None else partial(self.core_attention, documents=documents)
        if self.checkpoint_core_attention and self.training:
            # The merge logits and omega need a gradient. Checkpointing gives it only to arguments.
            return tensor_parallel.checkpoint(attend, False, *tensors)
        return attend(*tensors)

    @torch.no_grad()
    def clear_decision_channel(self) -> None:
        """Ends phase zero_out: the q and k rows of the last channel become zero. Then a = -c and b = +c exactly."""
        head_dim = self.hidden_size_per_attention_head
        for parameter in (self.linear_qkv.weight, self.linear_qkv.bias):
            if parameter is not None:
                # [group][q ... q k v][head_dim]
                rows = parameter.view(self.num_query_groups_per_partition, -1, head_dim, *parameter.shape[1:])
                rows[:, :-1, -1] = 0


def _context_group(config: TransformerConfig, pg_collection: Any) -> dist.ProcessGroup | None:
    """The ranks that share a sequence; None: one rank has all of it."""
    return pg_collection.cp if config.context_parallel_size > 1 else None
