"""A plain model's cache in few bits per number, in the groups of KIVI (Liu et al. 2024, arXiv 2402.02750, section 3)."""

import math
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from transformers import DynamicLayer

from megatron_dmc.baselines.baseline import Baseline, Kept
from megatron_dmc.baselines.packed import Packed
from megatron_dmc.baselines.presses import QUANTIZED
from megatron_dmc.config import ConfigError
from megatron_dmc.convert.hf_config import read_config
from megatron_dmc.hf.cache import CACHE_NAME


@dataclass(frozen=True)
class Quantized(Baseline):
    """Keys in groups of one channel's tokens, values in groups of one token's channels; the context's last tokens, which fill
    no group, stay as they are.

    Attributes:
        bits: of a number: 8, 4 or 2. Each group has two numbers of the cache's dtype more.
        group: numbers that share them; of values a divisor of the head dimension.
    """

    bits: int
    group: int = 32

    @property
    def name(self) -> str:
        return QUANTIZED

    def check(self, folder: str, shortest: int) -> None:
        super().check(folder, shortest)
        model, _ = read_config(Path(folder))
        if model.head_dim % 8:
            raise ConfigError(
                f"--baseline quantized: {folder} has a head dimension of {model.head_dim}, which does not fill bytes; name a "
                "model with a multiple of 8"
            )

    @torch.inference_mode()
    def read(self, model: Any, context: Tensor) -> tuple[Tensor, Kept]:
        made = model(context[None].to(model.device), use_cache=True, logits_to_keep=1)
        cache = made[CACHE_NAME]
        for number, layer in enumerate(cache.layers):
            cache.layers[number] = QuantizedLayer(layer.keys, layer.values, self)
        return made.logits[0], Kept(cache, len(context))

    def slots(self, model: Any, kept: Kept) -> None:
        """As many as tokens: the slots are smaller."""

    def nbytes(self, model: Any, kept: Kept) -> int:
        """Of what is kept from one step to the next. While a layer attends, its keys and values are there in full as well."""
        return sum(layer.nbytes for layer in kept.cache.layers)


class QuantizedLayer(DynamicLayer):
    """transformers' layer of a cache; its own keys and values [1, kv_heads, tokens, head_dim] are those that are whole.

    Args:
        keys, values: of a context, [1, kv_heads, tokens, head_dim].
    """

    def __init__(self, keys: Tensor, values: Tensor, settings: Quantized) -> None:
        super().__init__()
        bits, group = settings.bits, settings.group
        self._packed = keys.shape[2] // group * group
        # A channel's tokens lie one after the other.
        self._keys = Packed.of(keys[:, :, : self._packed].transpose(2, 3), bits, group)
        self._values = Packed.of(values[:, :, : self._packed], bits, math.gcd(group, values.shape[3]))
        # It copies them.
        super().update(keys[:, :, self._packed :], values[:, :, self._packed :])

    def update(self, *arguments: Any, **more: Any) -> tuple[Tensor, Tensor]:
        keys, values = super().update(*arguments, **more)
        packed = self._keys.numbers().transpose(2, 3), self._values.numbers()
        return torch.cat([packed[0], keys], dim=2), torch.cat([packed[1], values], dim=2)

    def get_seq_length(self) -> int:
        return self._packed + super().get_seq_length()

    @property
    def nbytes(self) -> int:
        whole = self.keys, self.values
        return self._keys.nbytes + self._values.nbytes + sum(x.nbytes for x in whole if x is not None)
