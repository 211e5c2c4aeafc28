"""Llama with Dynamic Memory Compression (Nawrot et al., ICML 2024, arXiv 2403.09636) for transformers 5."""

from typing import Any

import torch
from torch import Tensor, nn
from transformers import Cache, GenerationMixin, PreTrainedModel
from transformers import initialization as init
from transformers.generation.configuration_utils import GenerationMode
from transformers.modeling_layers import GradientCheckpointingLayer
from transformers.modeling_outputs import BaseModelOutputWithPast, CausalLMOutputWithPast
from transformers.models.llama.modeling_llama import LlamaMLP, LlamaRMSNorm, LlamaRotaryEmbedding
from transformers.utils import can_return_tuple

from megatron_dmc.hf.adapter import joined, lacks_its_base
from megatron_dmc.hf.cache import CACHE_NAME, DMCCache
from megatron_dmc.hf.configuration_dmc import DMCLlamaConfig
from megatron_dmc.hf.padding import Packing
from megatron_dmc.ops.attention import windowed_dmc_attention
from megatron_dmc.ops.decisions import (
    clear_channel,
    hard_merge_logits,
    neuron_logits,
    omega_from_logits,
    omega_of_absorbed,
    projection_logits,
)
from megatron_dmc.ops.decode import LayerCache
from megatron_dmc.ops.states import attention_states
from megatron_dmc.ops.tokens import Tokens


class DecisionProjection(nn.Linear):
    """W and beta of the `projection` source, rows (a_0, b_0, a_1, b_1, ...); zero at first, so that nothing merges."""


class DMCLlamaAttention(nn.Module):
    """Llama's attention whose keys and values merge into slots. Decisions are binary, also in training mode."""

    def __init__(self, config: DMCLlamaConfig, layer_idx: int):
        super().__init__()
        self.layer_idx = layer_idx
        self.head_dim = config.head_dim or config.hidden_size // config.num_attention_heads
        self.dmc = config.dmc
        self.neuron = config.dmc["decision_source"] == "neuron"
        self.absorbs = config.dmc["operation"] == "absorb"
        kv_heads = config.num_key_value_heads or config.num_attention_heads
        self.q_proj = nn.Linear(config.hidden_size, config.num_attention_heads * self.head_dim, bias=False)
        self.k_proj = nn.Linear(config.hidden_size, kv_heads * self.head_dim, bias=False)
        self.v_proj = nn.Linear(config.hidden_size, kv_heads * self.head_dim, bias=False)
        self.o_proj = nn.Linear(config.num_attention_heads * self.head_dim, config.hidden_size, bias=False)
        if not self.neuron:
            self.decision = DecisionProjection(config.hidden_size, 2 * kv_heads)

    def forward(
        self, hidden: Tensor, cos: Tensor, sin: Tensor, cache: LayerCache | None, lengths: Tensor | None
    ) -> Tensor:
        """hidden [batch, seq, hidden] (normed), cos and sin [batch or 1, seq, 1, head_dim] -> [batch, seq, hidden]."""
        query, key, value = (
            projection(hidden).unflatten(-1, (-1, self.head_dim))
            for projection in (self.q_proj, self.k_proj, self.v_proj)
        )
        biases = self.dmc["decision_bias"], 0.0 if self.absorbs else self.dmc["decision_bias"]
        if self.neuron:
            decision_logits, omega_logits = neuron_logits(query, key, *biases)
            query, key = clear_channel(query), clear_channel(key)
        else:
            decision_logits, omega_logits = projection_logits(
                self.decision(hidden), *biases, self.dmc["decision_scale"]
            )
        if self.dmc["per_layer"]:
            decision_logits = decision_logits.mean(-1, keepdim=True).expand_as(decision_logits)
        alpha = decision_logits > 0
        if self.absorbs:
            omega = omega_of_absorbed(omega_logits)
        else:
            omega = omega_from_logits(omega_logits, self.dmc["omega_floor"])
        if cache is not None:
            out = cache.attend(query, key, value, alpha, omega, cos, sin, lengths=lengths)
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
                hard_merge_logits(decision_logits),
                omega=omega if self.absorbs else None,
                bias_channel=-1 if self.neuron else None,
                **when,
            )
        return self.o_proj(out.flatten(2))


class DMCLlamaDecoderLayer(GradientCheckpointingLayer):
    def __init__(self, config: DMCLlamaConfig, layer_idx: int):
        super().__init__()
        self.self_attn = DMCLlamaAttention(config, layer_idx)
        self.mlp = LlamaMLP(config)
        self.input_layernorm = LlamaRMSNorm(config.hidden_size, eps=config.rms_norm_eps)
        self.post_attention_layernorm = LlamaRMSNorm(config.hidden_size, eps=config.rms_norm_eps)

    def forward(
        self, hidden: Tensor, cos: Tensor, sin: Tensor, cache: LayerCache | None, lengths: Tensor | None
    ) -> Tensor:
        hidden = hidden + self.self_attn(self.input_layernorm(hidden), cos, sin, cache, lengths)
        return hidden + self.mlp(self.post_attention_layernorm(hidden))


class DMCLlamaPreTrainedModel(PreTrainedModel):
    config_class = DMCLlamaConfig
    config: DMCLlamaConfig
    base_model_prefix = "model"
    supports_gradient_checkpointing = True
    _no_split_modules = ["DMCLlamaDecoderLayer"]  # noqa: RUF012 (transformers' form)
    _skip_keys_device_placement = ["past_key_values", "cache"]  # noqa: RUF012
    _supports_sdpa = True

    @classmethod
    def from_pretrained(
        cls, pretrained_model_name_or_path: Any, *model_args: Any, base: Any = None, **kwargs: Any
    ) -> Any:
        """As in transformers. An adapter's folder is loaded with the weights of the base that it was trained on.

        ``AutoModelForCausalLM.from_pretrained(adapter, base=llama, trust_remote_code=True)`` takes the same arguments as
        the merged export's folder and gives the same model, to the last bit.

        Args:
            pretrained_model_name_or_path: an export, or an adapter's folder (megatron-dmc convert-to-hf --adapter).
            base: a plain Llama's folder, for an adapter only.

        Raises:
            ValueError: an adapter without a base, a base without an adapter, or two whose sizes or settings differ. Weights
                are not compared: another model of the same sizes is taken.
        """
        name = pretrained_model_name_or_path
        if base is None:
            if lacks_its_base(name):
                raise ValueError(f"{name} is an adapter; name the folder of the Llama it was trained on with base=")
            return super().from_pretrained(name, *model_args, **kwargs)
        # The adapter's configuration is the whole model's.
        kwargs["config"] = kwargs.get("config") or name
        with joined(name, base, cls.config_class) as folder:
            loaded = super().from_pretrained(folder, *model_args, **kwargs)
        model = loaded[0] if isinstance(loaded, tuple) else loaded  # output_loading_info=True
        model.name_or_path = model.config.name_or_path = str(name)
        return loaded

    @torch.no_grad()
    def _init_weights(self, module: nn.Module) -> None:
        super()._init_weights(module)
        if isinstance(module, DecisionProjection):
            init.zeros_(module.weight)
            init.zeros_(module.bias)


class DMCLlamaModel(DMCLlamaPreTrainedModel):
    def __init__(self, config: DMCLlamaConfig):
        super().__init__(config)
        self.embed_tokens = nn.Embedding(config.vocab_size, config.hidden_size, config.pad_token_id)
        self.layers = nn.ModuleList(DMCLlamaDecoderLayer(config, i) for i in range(config.num_hidden_layers))
        self.norm = LlamaRMSNorm(config.hidden_size, eps=config.rms_norm_eps)
        self.rotary_emb = LlamaRotaryEmbedding(config=config)
        self.gradient_checkpointing = False
        self.post_init()

    @can_return_tuple
    def forward(
        self,
        input_ids: Tensor | None = None,
        attention_mask: Tensor | None = None,
        position_ids: Tensor | None = None,
        past_key_values: Any = None,
        inputs_embeds: Tensor | None = None,
        use_cache: bool | None = None,
        output_attentions: bool | None = None,
        output_hidden_states: bool | None = None,
        cache: Any = None,
        **kwargs: Any,
    ) -> BaseModelOutputWithPast:
        """The hidden states after the last layer and the final norm.

        Args:
            input_ids, inputs_embeds: one of them, [batch, seq] or [batch, seq, hidden].
            attention_mask: [batch, seq], or with the columns of past_key_values before them; zero at padding, which may be
                anywhere. Past columns must be masked as they were when they were taken in.
            position_ids: must agree with the mask: a row's real tokens count from 0.
            past_key_values, cache: two names for the same argument (transformers 5.24 renamed it): a DMCCache, or None.
            use_cache: None follows the configuration, but means False where gradients are recorded: the cache has none.
            output_hidden_states: also return the states before every layer and after the final norm.

        Raises:
            ValueError: an argument that cannot be honoured; the message names it.
        """
        if (input_ids is None) == (inputs_embeds is None):
            raise ValueError("give either input_ids or inputs_embeds")
        if output_attentions or self.config.output_attentions:
            raise ValueError("output_attentions=True is not supported: no attention weights are ever stored")
        hidden = self.embed_tokens(input_ids) if inputs_embeds is None else inputs_embeds
        batch, seq = hidden.shape[:2]
        if seq == 0:
            raise ValueError("there are no new tokens: the cache already holds everything that was given")
        if use_cache is None:
            use_cache = self.config.use_cache and not torch.is_grad_enabled()
        cache = self._cache(past_key_values if cache is None else cache, use_cache)
        keep_states = bool(output_hidden_states or self.config.output_hidden_states)
        if cache is not None and cache.columns > 0 and cache.batch_size != batch:
            raise ValueError(
                f"past_key_values holds {cache.batch_size} sequences, got {batch}; give it as many with its "
                "batch_repeat_interleave or batch_select_indices, or start a new one"
            )
        packing = _packing(attention_mask, batch, seq, cache)
        first = torch.zeros(1, 1, dtype=torch.long, device=hidden.device)
        if cache is not None and cache.columns > 0:
            first = cache.tokens[:, None]
        if seq > 1:  # a single step skips the check, which would wait for a GPU
            _check_positions(position_ids, packing, first, seq)
        if packing is not None:
            hidden = packing.pack(hidden)
        positions = first + torch.arange(hidden.shape[1], device=hidden.device)
        cos, sin = (x[:, :, None] for x in self.rotary_emb(hidden, positions))
        states = self._run_layers(hidden, cos, sin, cache, None if packing is None else packing.lengths, keep_states)
        states[-1] = self.norm(states[-1])
        if packing is not None:
            states = [packing.unpack(x) for x in states]
        if cache is not None:
            cache.take_columns(None if packing is None else packing.real, batch, seq)
        return BaseModelOutputWithPast(
            last_hidden_state=states[-1],
            hidden_states=tuple(states) if keep_states else None,
            **{CACHE_NAME: cache},
        )

    def _run_layers(
        self, hidden: Tensor, cos: Tensor, sin: Tensor, cache: DMCCache | None, lengths: Tensor | None, keep: bool
    ) -> list[Tensor]:
        """The states after the last layer; with ``keep`` those before each layer come first. A cache takes chunks."""
        seq = hidden.shape[1]
        size = seq if cache is None else self.config.prefill_chunk_tokens
        chunks = []
        for start in range(0, seq, size):
            stop = min(start + size, seq)
            real = None if lengths is None else (lengths - start).clamp(0, stop - start)
            states = [hidden[:, start:stop]]
            for i, layer in enumerate(self.layers):
                layer_cache = None if cache is None else cache.layers[i]
                out = layer(states[-1], cos[:, start:stop], sin[:, start:stop], layer_cache, real)
                states = [*states, out] if keep else [out]
            chunks.append(states)
        return [torch.cat(pieces, dim=1) for pieces in zip(*chunks, strict=True)]

    def _cache(self, past_key_values: Any, use_cache: bool) -> DMCCache | None:
        if past_key_values is None:
            return DMCCache(self.config) if use_cache else None
        if not isinstance(past_key_values, DMCCache):
            raise ValueError(f"past_key_values must be None or a DMCCache, got {type(past_key_values).__name__}")
        return past_key_values


class DMCLlamaForCausalLM(DMCLlamaPreTrainedModel, GenerationMixin):
    _tied_weights_keys = {"lm_head.weight": "model.embed_tokens.weight"}  # noqa: RUF012

    def __init__(self, config: DMCLlamaConfig):
        super().__init__(config)
        self.model = DMCLlamaModel(config)
        self.vocab_size = config.vocab_size
        self.lm_head = nn.Linear(config.hidden_size, config.vocab_size, bias=False)
        self.post_init()

    @can_return_tuple
    def forward(
        self,
        input_ids: Tensor | None = None,
        attention_mask: Tensor | None = None,
        position_ids: Tensor | None = None,
        past_key_values: Any = None,
        inputs_embeds: Tensor | None = None,
        labels: Tensor | None = None,
        use_cache: bool | None = None,
        logits_to_keep: int | Tensor = 0,
        cache: Any = None,
        **kwargs: Any,
    ) -> CausalLMOutputWithPast:
        """Logits of the next token, and the loss where labels are given. Arguments as DMCLlamaModel's and Llama's."""
        outputs = self.model(
            input_ids=input_ids,
            attention_mask=attention_mask,
            position_ids=position_ids,
            past_key_values=past_key_values,
            inputs_embeds=inputs_embeds,
            use_cache=use_cache,
            cache=cache,
            return_dict=True,
            **kwargs,
        )
        kept = slice(-logits_to_keep, None) if isinstance(logits_to_keep, int) else logits_to_keep
        logits = self.lm_head(outputs.last_hidden_state[:, kept])
        loss = None
        if labels is not None:
            loss = self.loss_function(logits=logits, labels=labels, vocab_size=self.config.vocab_size, **kwargs)
        return CausalLMOutputWithPast(
            loss=loss,
            logits=logits,
            hidden_states=outputs.hidden_states,
            **{CACHE_NAME: outputs.get(CACHE_NAME)},
        )

    def _prepare_cache_for_generation(  # type: ignore[override]
        self, generation_config: Any, model_kwargs: dict[str, Any], *args: Any, **kwargs: Any
    ) -> None:
        """generate() calls this for its cache."""
        asked = (*args, *kwargs.values())
        if GenerationMode.ASSISTED_GENERATION in asked or getattr(generation_config, "is_assistant", False):
            raise ValueError(
                "assisted generation is not supported: a rejected token that was merged cannot be taken out of its slot"
            )
        if generation_config.cache_implementation not in (None, "dynamic", "dynamic_full"):
            raise ValueError(
                f"cache_implementation={generation_config.cache_implementation!r} is not supported: this model has its "
                "compressed cache only; leave it out"
            )
        cache = model_kwargs.get(CACHE_NAME)
        if isinstance(cache, Cache) and cache.get_seq_length() == 0 and not isinstance(cache, DMCCache):
            cache = None  # another kind, still empty
        if cache is None and generation_config.use_cache is not False:
            model_kwargs[CACHE_NAME] = DMCCache(self.config)


def _packing(attention_mask: Tensor | None, batch: int, seq: int, cache: DMCCache | None) -> Packing | None:
    """None if there is no padding."""
    if attention_mask is None:
        return None
    past = 0 if cache is None else cache.columns
    shape = list(getattr(attention_mask, "shape", ()))
    if len(shape) != 2 or shape[0] != batch or shape[1] not in (seq, past + seq):
        columns = f"{past + seq} columns" + (f" (past and new tokens) or {seq} (only the new ones)" if past else "")
        found = shape or type(attention_mask).__name__
        raise ValueError(
            f"attention_mask must have {batch} rows and {columns}, zero at padding, got {found}; attention itself is always "
            "causal"
        )
    real = attention_mask != 0
    if (cache is None or cache.real is None) and bool(real.all()):
        return None
    if cache is not None and shape[1] != seq:
        _check_past(real[:, :past], cache)
    real = real[:, -seq:]
    return None if bool(real.all()) else Packing(real)


def _check_past(real: Tensor, cache: DMCCache) -> None:
    """real [batch, past columns] by the mask. What was taken in is in its slots, what was padding is nowhere."""
    differs = ~real if cache.real is None else real != cache.real.to(real.device)
    if bool(differs.any()):
        row, column = (int(index) for index in differs.nonzero()[0])
        is_real = bool(real[row, column])
        raise ValueError(
            f"attention_mask is {int(is_real)} at row {row}, column {column}, where past_key_values "
            + (
                "took in padding: there is no token to attend to"
                if is_real
                else "took in a token: merged, it cannot be hidden"
            )
            + "; give past columns the mask they had, or start anew without past_key_values"
        )


def _check_positions(position_ids: Tensor | None, packing: Packing | None, first: Tensor, seq: int) -> None:
    """Refuses positions that differ from the mask's: they would mean packed documents, which this model cannot keep apart."""
    if position_ids is None:
        return
    if packing is None:
        expected, real = first + torch.arange(seq, device=first.device), torch.ones_like(first, dtype=torch.bool)
    else:
        expected, real = first + packing.place, packing.real
    if not bool(((position_ids == expected) | ~real).all()):
        raise ValueError(
            "position_ids must count every row's real tokens from 0, those in past_key_values first: packed sequences are "
            "not supported; leave position_ids out, and give an attention_mask of past and new tokens"
        )
