"""Methods that need no training, as kvpress has them (github.com/NVIDIA/kvpress)."""

import importlib.util
from dataclasses import dataclass
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor
from transformers import DynamicCache
from transformers.masking_utils import AttentionMaskInterface
from transformers.modeling_utils import AttentionInterface

from megatron_dmc.baselines.baseline import Baseline, Kept
from megatron_dmc.baselines.presses import NEED_WEIGHTS, OF_KVPRESS, PRESSES, QUANTIZED
from megatron_dmc.config import ConfigError
from megatron_dmc.hf.cache import CACHE_NAME

# Attention in which each head sees its own part of a context.
_ATTENTION = "hidden_keys"


@dataclass(frozen=True)
class Press(Baseline):
    """A press of kvpress, applied to a context before its question is read.

    Attributes:
        compression_ratio: tokens per slot of a context, above 1.
        press: one of PRESSES.
    """

    compression_ratio: float
    press: str = "snapkv"

    @property
    def name(self) -> str:
        return self.press

    @property
    def attention(self) -> str:
        if self.press in NEED_WEIGHTS:
            return "eager"
        AttentionInterface.register(_ATTENTION, _attend)
        AttentionMaskInterface.register(_ATTENTION, lambda *_, **__: None)
        return _ATTENTION

    def check(self, folder: str, shortest: int) -> None:
        if self.press not in OF_KVPRESS:
            raise ConfigError(
                f"--baseline {self.press}: there is none of that name; name one of {', '.join((*OF_KVPRESS, QUANTIZED))}"
            )
        if importlib.util.find_spec("kvpress") is None:
            raise ConfigError(
                f"--baseline {self.press} needs kvpress, which wants an older transformers; run pip install kvpress in an "
                "environment of its own, or use the one of make kvpress"
            )
        super().check(folder, shortest)
        if shortest / self.compression_ratio < 1:
            raise ConfigError(
                f"--compression-ratio {self.compression_ratio:g} keeps less than one of {shortest} tokens; ask for less"
            )

    @torch.inference_mode()
    def read(self, model: Any, context: Tensor) -> tuple[Tensor, Kept]:
        import kvpress

        cache, layers = DynamicCache(), [layer.self_attn for layer in model.model.layers]
        for layer in layers:
            layer.masked_key_indices = layer.hidden = None
        with PRESSES[self.press](kvpress, 1 - 1 / self.compression_ratio)(model):
            # As kvpress' own pipeline calls it: some presses look for these names.
            states = model.model(input_ids=context[None].to(model.device), **{CACHE_NAME: cache}).last_hidden_state
        for layer in layers:
            layer.hidden, layer.masked_key_indices = _hidden(layer, len(context)), None
        return model.lm_head(states[0, -1:]), Kept(cache, len(context))

    def slots(self, model: Any, kept: Kept) -> Tensor:
        """What is hidden from a head does not count, though it is still in memory."""
        slots = torch.tensor([[layer.keys.shape[2]] * layer.keys.shape[1] for layer in kept.cache.layers])
        for number, layer in enumerate(model.model.layers):
            if layer.self_attn.hidden is not None:
                slots[number] -= layer.self_attn.hidden.sum(1).cpu()
        return slots

    def nbytes(self, model: Any, kept: Kept) -> int:
        one = kept.cache.layers[0].keys
        return int(self.slots(model, kept).sum()) * 2 * one.shape[-1] * one.element_size()


def _hidden(layer: Any, tokens: int) -> Tensor | None:
    """Which keys a press that drops other ones in each head has left in the cache, bool [kv_heads, tokens]; None: none.

    kvpress itself hides them by keys that no query attends to. There is not always one: it ends with an error then.
    """
    if layer.masked_key_indices is None:
        return None
    _, heads, places = layer.masked_key_indices
    hidden = torch.zeros(layer.config.num_key_value_heads, tokens, dtype=torch.bool, device=places.device)
    hidden[heads.to(places.device), places] = True
    return hidden


def _attend(
    module: Any,
    query: Tensor,
    key: Tensor,
    value: Tensor,
    attention_mask: Any = None,
    dropout: float = 0.0,
    *,
    scaling: float,
    **_: Any,
) -> tuple[Tensor, None]:
    """Causal attention as transformers calls it: query [1, heads, seq, head_dim]; key, value [1, kv_heads, keys, head_dim]."""
    seq, keys = query.shape[2], key.shape[2]
    visible = None
    if seq < keys:
        visible = torch.ones(seq, keys, dtype=torch.bool, device=query.device).tril(keys - seq)[None]
        if module.hidden is not None:
            seen = F.pad(~module.hidden, (0, keys - module.hidden.shape[1]), value=True)
            visible = visible & seen.repeat_interleave(module.num_key_value_groups, dim=0)[:, None]
    out = F.scaled_dot_product_attention(
        query,
        key.repeat_interleave(module.num_key_value_groups, dim=1),
        value.repeat_interleave(module.num_key_value_groups, dim=1),
        attn_mask=visible,
        is_causal=visible is None,
        scale=scaling,
    )
    return out.transpose(1, 2).contiguous(), None
