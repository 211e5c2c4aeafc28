"""The compressed cache as transformers' generate() handles one."""

import operator
from collections.abc import Mapping
from typing import Any, NoReturn

import torch
from torch import Tensor
from transformers import Cache
from transformers.modeling_outputs import BaseModelOutputWithPast

from megatron_dmc.ops.decode import LayerCache, Sequences, bytes_of
from megatron_dmc.ops.decode.codes import check_cache_dtype
from megatron_dmc.ops.decode.layer_cache import INTERRUPTED, check_numbers

# What models' arguments and outputs call their cache: transformers 5.24 renamed it.
CACHE_NAME = "cache" if "cache" in BaseModelOutputWithPast.__dataclass_fields__ else "past_key_values"


class DMCCache(Cache):
    """One LayerCache per layer. Every head has a length of its own: its number of slots, not of tokens.

    Attributes:
        layers: the LayerCaches.
        cache_dtype: of the slots that have left the window, see DMCConfiguration; None: the model's.
        columns: columns of input_ids seen, padding counted. generate() calls this number the cache's length.
        real: bool [batch, columns], false where a column held padding; None: none did.
        calls: of the layers, by which ``columns`` were counted. They have had more while the model runs, or if it was
            interrupted.
    """

    is_compileable = False
    is_croppable = False
    is_initialized = True

    def __init__(self, config: Any, cache_dtype: str | None = None):
        """
        Args:
            config: of a DMC model.
            cache_dtype: in place of the configuration's.

        Raises:
            ValueError: there is no such one.
        """
        # Cache.__init__ is not called: all that it sets up is for layers that hold one dense tensor each.
        dmc = config.dmc
        clears = dmc["decision_source"] == "neuron"
        self.cache_dtype = config.cache_dtype if cache_dtype is None else check_cache_dtype("cache_dtype", cache_dtype)
        # What the layers know together.
        self.shared: dict[torch.device, Sequences] = {}
        self.layers: Any = [
            LayerCache(
                dmc["local_window"],
                dmc["operation"],
                dmc["window_size"],
                clears_last_channel=clears,
                cache_dtype=self.cache_dtype,
                shared=self.shared,
            )
            for _ in range(config.num_hidden_layers)
        ]
        self.offloading = False
        self.columns = 0
        self.real: Tensor | None = None
        self.calls = 0

    def __repr__(self) -> str:
        return f"DMCCache(columns={self.columns}, nbytes={self.nbytes})"

    def __len__(self) -> int:
        return len(self.layers)

    @property
    def tokens(self) -> Tensor:
        """Real tokens of each sequence, int64 [batch]."""
        return self.layers[0].tokens

    @property
    def slots(self) -> Tensor:
        """Slots in use, int64 [layers, batch, kv_heads]."""
        return torch.stack([layer.slots.to(self.tokens.device) for layer in self.layers])

    @property
    def compression_ratio(self) -> float:
        """Tokens per slot over all layers, heads and sequences; 1 for an empty cache."""
        slots = self.slots
        kept = int(slots.sum())
        return int(self.tokens.sum()) * slots.shape[0] * slots.shape[2] / kept if kept else 1.0

    @property
    def nbytes(self) -> int:
        """Bytes held, in codes where there are some; unused slots of pages included."""
        layers = sum(layer.nbytes for layer in self.layers) + bytes_of(*self.shared.values())
        return layers + (0 if self.real is None else self.real.nbytes)

    @property
    def batch_size(self) -> int:
        return len(self.tokens)

    max_batch_size = batch_size

    @property
    def is_sliding(self) -> list[bool]:
        return [False] * len(self.layers)

    def get_seq_length(self, layer_idx: int = 0) -> int:
        return self.columns

    def get_max_length(self, layer_idx: int | None = None) -> int:
        """No limit. Early releases of transformers 5 call it get_max_cache_shape."""
        return -1

    def get_max_cache_shape(self, layer_idx: int = 0) -> int:
        return -1

    def reset(self) -> None:
        self.shared.clear()
        for layer in self.layers:
            layer.reset()
        self.columns = 0
        self.real = None
        self.calls = 0

    def check(self) -> None:
        """Before the layers take tokens in, and :meth:`take_columns` counts them.

        Raises:
            ValueError: an earlier call was interrupted.
        """
        if self._calls_of_layers() != self.calls:
            raise ValueError(INTERRUPTED)

    def _calls_of_layers(self) -> int:
        return max((sequences.calls for sequences in self.shared.values()), default=0)

    def take_columns(self, real: Tensor | None, batch: int, seq: int) -> None:
        """Notes ``seq`` new columns, of which ``real`` (bool [batch, seq]; None: all) are no padding."""
        if real is not None or self.real is not None:
            device = next(x.device for x in (self.real, real) if x is not None)
            before, new = (
                torch.ones(batch, width, dtype=torch.bool, device=device) if each is None else each.to(device)
                for each, width in ((self.real, self.columns), (real, seq))
            )
            self.real = torch.cat([before, new], dim=1)
        self.columns += seq
        for sequences in self.shared.values():
            sequences.finish()
        self.calls = self._calls_of_layers()

    def reorder_cache(self, beam_idx: Tensor) -> None:
        """Sequence i becomes what beam_idx[i] was; raises ValueError for what are no numbers."""
        check_numbers(beam_idx)
        if len(beam_idx) == 0:
            return self.reset()
        for device, sequences in self.shared.items():
            sequences.select(beam_idx.to(device))
        for layer in self.layers:
            layer.select(beam_idx)
        if self.real is not None:
            self.real = self.real[beam_idx.to(self.real.device)]

    def batch_select_indices(self, indices: Tensor) -> None:
        """indices: numbers, or a mask, which transformers' own caches take as well."""
        self.reorder_cache(indices.nonzero()[:, 0] if indices.dtype == torch.bool else indices)

    def batch_repeat_interleave(self, repeats: int) -> None:
        self.reorder_cache(torch.arange(self.batch_size).repeat_interleave(repeats))

    def to(self, device: torch.device | str) -> "DMCCache":
        """Moves everything to a device, and returns itself."""
        for layer in self.layers:
            layer.to(device)
        for left in set(self.shared) - {layer.tokens.device for layer in self.layers}:
            del self.shared[left]
        self.real = None if self.real is None else self.real.to(device)
        return self

    def state_dict(self) -> dict[str, Any]:
        """Everything, as tensors, numbers and strings: what torch.save writes and torch.load reads with weights_only.

        Raises:
            ValueError: a call was interrupted.
        """
        self.check()
        return {"columns": self.columns, "real": self.real, "layers": [layer.state_dict() for layer in self.layers]}

    @classmethod
    def from_state_dict(cls, config: Any, state: Mapping[str, Any]) -> "DMCCache":
        """The cache that :meth:`state_dict` was asked of.

        Args:
            config: of the same model.

        Raises:
            ValueError: it is another model's, or damaged.
        """
        try:
            layers = list(state["layers"])
            cache = cls(config, layers[0]["layout"].get("cache_dtype") if layers else None)
            cache.columns, cache.real = operator.index(state["columns"]), state["real"]
        except (KeyError, TypeError, ValueError, AttributeError) as error:
            raise ValueError(f"this is no saved DMCCache ({error!r}); save its state_dict()") from None
        if len(layers) != len(cache):
            raise ValueError(f"the saved cache has {len(layers)} layers, the model {len(cache)}; load the model's own")
        for layer, saved in zip(cache.layers, layers, strict=True):
            layer.load_state_dict(saved)
        if not cache._columns_fit():
            raise ValueError(
                "this is no saved DMCCache, or a damaged one: its columns and real ones do not fit; save it again"
            )
        return cache

    def _columns_fit(self) -> bool:
        """Whether every sequence has as many tokens as columns that are real."""
        real, tokens = self.real, self.tokens
        if any(len(layer.tokens) != len(tokens) for layer in self.layers) or not 0 <= self.columns < 2**62:
            return False
        if real is None:
            return bool((tokens == self.columns).all()) if len(tokens) else self.columns == 0
        if not isinstance(real, Tensor) or real.dtype != torch.bool or real.shape != (len(tokens), self.columns):
            return False
        return torch.equal(real.sum(1), tokens.to(real.device))

    def update(self, *args: Any, **kwargs: Any) -> NoReturn:
        raise TypeError("a DMCCache takes tokens in by attention; another model's update() cannot fill it")

    def get_mask_sizes(self, *args: Any, **kwargs: Any) -> NoReturn:
        raise TypeError("a DMCCache has no mask: every head keeps its own number of slots")

    def crop(self, *args: Any, **kwargs: Any) -> NoReturn:
        raise ValueError("a DMCCache cannot be cropped: a merged token cannot be taken out of its slot again")

    def activate_past_recording(self) -> NoReturn:
        self.crop()
