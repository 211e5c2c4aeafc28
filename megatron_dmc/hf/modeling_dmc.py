"""Models of transformers 5 with Dynamic Memory Compression (Nawrot et al., ICML 2024, arXiv 2403.09636).

A family's model is transformers' own: its embedding, layers, norms and rotary embedding, with another attention in the layers.
Its classes (``families/``) have the ones of this file before transformers' among their bases.
"""

from typing import Any

import torch
from torch import Tensor, nn
from transformers import Cache, PreTrainedModel
from transformers import initialization as init
from transformers.generation.configuration_utils import GenerationMode
from transformers.modeling_outputs import BaseModelOutputWithPast, CausalLMOutputWithPast
from transformers.utils import can_return_tuple

from megatron_dmc.hf.adapter import joined, lacks_its_base
from megatron_dmc.hf.attention import DecisionProjection
from megatron_dmc.hf.cache import CACHE_NAME, DMCCache
from megatron_dmc.hf.configuration_dmc import DMC_TYPE
from megatron_dmc.hf.curve import MOST_THRESHOLD, check_threshold
from megatron_dmc.hf.padding import Packing
from megatron_dmc.ops.decode.codes import check_cache_dtype


class DMCPreTrainedModel(PreTrainedModel):
    """What the classes of a family's models share."""

    config_class: Any
    base_model_prefix = "model"
    supports_gradient_checkpointing = True
    _skip_keys_device_placement = ["past_key_values", "cache"]  # noqa: RUF012 (transformers' form)
    # The layers have an attention of their own, whichever is asked for.
    _supports_sdpa = True
    _supports_flash_attn = _supports_flex_attn = _supports_attention_backend = False
    _can_compile_fullgraph = False

    @classmethod
    def from_pretrained(
        cls, pretrained_model_name_or_path: Any, *model_args: Any, base: Any = None, **kwargs: Any
    ) -> Any:
        """As in transformers. An adapter's folder is loaded with the weights of the base that it was trained on.

        ``AutoModelForCausalLM.from_pretrained(adapter, base=plain, trust_remote_code=True)`` takes the same arguments as
        the merged export's folder and gives the same model, to the last bit.

        Args:
            pretrained_model_name_or_path: an export, or an adapter's folder (megatron-dmc convert-to-hf --adapter).
            base: the folder of the plain model that it was trained on, for an adapter only.

        Raises:
            ValueError: an adapter without a base, a base without an adapter, or two whose sizes or settings differ. Weights
                are not compared: another model of the same sizes is taken. And an attn_implementation that is none here.
        """
        name = pretrained_model_name_or_path
        asked = kwargs.get("attn_implementation")
        if isinstance(asked, str) and asked.split("|")[-1] not in ("eager", "sdpa"):
            raise ValueError(
                f"attn_implementation={asked!r} is not supported: a compressed model has an attention of its own, which "
                "chooses its kernels; leave it out"
            )
        if base is None:
            if lacks_its_base(name):
                raise ValueError(f"{name} is an adapter; name the folder of the model it was trained on with base=")
            return super().from_pretrained(name, *model_args, **kwargs)
        # The adapter's configuration is the whole model's.
        kwargs["config"] = kwargs.get("config") or name
        wants_info = kwargs.pop("output_loading_info", False)
        with joined(name, base, cls.config_class) as folder:
            loaded: Any = super().from_pretrained(folder, *model_args, output_loading_info=True, **kwargs)
        model, info = loaded
        # transformers fills what is not there with random numbers, and says so in a table.
        if lost := sorted(info["missing_keys"]):
            family = model.config.model_type.removeprefix(DMC_TYPE)
            raise ValueError(f"{base} lacks {lost[0]}; it is damaged, or no {family}: fetch it again")
        model.name_or_path = model.config.name_or_path = str(name)
        return (model, info) if wants_info else model

    @torch.no_grad()
    def _init_weights(self, module: nn.Module) -> None:
        super()._init_weights(module)
        if isinstance(module, DecisionProjection):
            init.zeros_(module.weight)
            init.zeros_(module.bias)


class DMCModel(DMCPreTrainedModel):
    """Stands before a family's model among the bases of a class.

    Attributes:
        attention_class: that of all layers.
    """

    attention_class: Any
    # The family's.
    layers: nn.ModuleList
    embed_tokens: nn.Embedding

    def __init__(self, config: Any):
        super().__init__(config)
        for i, layer in enumerate(self.layers):
            layer.self_attn = self.attention_class(config, i)
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
        merge_threshold: float | Tensor | None = None,
        cache_dtype: str | None = None,
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
            merge_threshold: logits, above which a new token merges: one number, or one for each sequence, [batch]. None: the
                configuration's.
            cache_dtype: of a new cache, see DMCConfiguration; None: the configuration's. Without a cache attention is what it
                would be with one, but where gradients are recorded: there it sees keys and values as they are.

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
        given = past_key_values if cache is None else cache
        cache = self._cache(given, use_cache, cache_dtype)
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
        lengths = None if packing is None else packing.lengths
        if cache is not None:
            cache.check()
        threshold = self._threshold(merge_threshold, hidden)
        states = self._run_layers(hidden, first, cache, lengths, keep_states, threshold)
        if packing is not None:
            states = [packing.unpack(x) for x in states]
        if cache is not None:
            cache.take_columns(None if packing is None else packing.real, batch, seq)
        return BaseModelOutputWithPast(
            last_hidden_state=states[-1],
            hidden_states=tuple(states) if keep_states else None,
            **{CACHE_NAME: cache if use_cache else given},
        )

    def _run_layers(
        self,
        hidden: Tensor,
        first: Tensor,
        cache: DMCCache | None,
        lengths: Tensor | None,
        keep: bool,
        merge_threshold: float | Tensor,
    ) -> list[Tensor]:
        """The states after the final norm; with ``keep`` those before each layer come first. A cache takes chunks."""
        seq = hidden.shape[1]
        size = seq if cache is None else self.config.prefill_chunk_tokens
        chunks = []
        for start in range(0, seq, size):
            stop = min(start + size, seq)
            out = super().forward(
                inputs_embeds=hidden[:, start:stop],
                # Only its form counts: transformers makes no mask where it gets one of four dimensions.
                attention_mask=hidden.new_empty(1, 1, 1, 1),
                position_ids=first + torch.arange(start, stop, device=hidden.device),
                use_cache=False,
                output_hidden_states=keep,
                # Under a name of its own: from a layer that checkpoints its activations, transformers takes the cache away.
                dmc_cache=cache,
                lengths=None if lengths is None else (lengths - start).clamp(0, stop - start),
                merge_threshold=merge_threshold,
                return_dict=True,
            )
            chunks.append(out.hidden_states if keep else [out.last_hidden_state])
        return [torch.cat(pieces, dim=1) for pieces in zip(*chunks, strict=True)]

    def _threshold(self, merge_threshold: float | Tensor | None, hidden: Tensor) -> float | Tensor:
        """A number, or [batch, 1, 1] in float32 on the device of the states."""
        if merge_threshold is None:
            merge_threshold = self.config.merge_threshold
        if not isinstance(merge_threshold, Tensor):
            return check_threshold("merge_threshold", merge_threshold)
        if merge_threshold.shape != hidden.shape[:1] or not merge_threshold.is_floating_point():
            raise ValueError(
                f"merge_threshold must be a number, or one for each of the {len(hidden)} sequences, got "
                f"{merge_threshold.dtype} {list(merge_threshold.shape)}"
            )
        # A single step skips the check, which would wait for a GPU.
        if hidden.shape[1] > 1 and not bool((merge_threshold.abs() <= MOST_THRESHOLD).all()):
            raise ValueError(
                f"merge_threshold must be numbers from -{MOST_THRESHOLD:g} to {MOST_THRESHOLD:g}, got "
                f"{merge_threshold.tolist()!r:.100}"
            )
        return merge_threshold.to(hidden.device, torch.float32)[:, None, None]

    def _cache(self, past_key_values: Any, use_cache: bool, cache_dtype: str | None) -> DMCCache | None:
        check_cache_dtype("cache_dtype", cache_dtype)
        if past_key_values is None:
            has_codes = (cache_dtype or self.config.cache_dtype) is not None
            needed = use_cache or (has_codes and not torch.is_grad_enabled())
            return DMCCache(self.config, cache_dtype) if needed else None
        if not isinstance(past_key_values, DMCCache):
            raise ValueError(f"past_key_values must be None or a DMCCache, got {type(past_key_values).__name__}")
        if cache_dtype not in (None, past_key_values.cache_dtype):
            raise ValueError(
                f"cache_dtype is {cache_dtype}, that of past_key_values {past_key_values.cache_dtype}: what is stored stays "
                "as it is; leave cache_dtype out, or start a new cache"
            )
        return past_key_values


class DMCForCausalLM(DMCPreTrainedModel):
    """Stands before GenerationMixin among the bases of a family's class.

    Attributes:
        model_class: a :class:`DMCModel`.
    """

    model_class: Any
    _tied_weights_keys = {"lm_head.weight": "model.embed_tokens.weight"}  # noqa: RUF012

    def __init__(self, config: Any):
        super().__init__(config)
        self.model = self.model_class(config)
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
        merge_threshold: float | Tensor | None = None,
        cache_dtype: str | None = None,
        **kwargs: Any,
    ) -> CausalLMOutputWithPast:
        """Logits of the next token, and the loss where labels are given. Arguments as DMCModel's and transformers'."""
        outputs = self.model(
            input_ids=input_ids,
            attention_mask=attention_mask,
            position_ids=position_ids,
            past_key_values=past_key_values,
            inputs_embeds=inputs_embeds,
            use_cache=use_cache,
            cache=cache,
            merge_threshold=merge_threshold,
            cache_dtype=cache_dtype,
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

    def _prepare_cache_for_generation(
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
            model_kwargs[CACHE_NAME] = DMCCache(self.config, model_kwargs.get("cache_dtype"))


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
