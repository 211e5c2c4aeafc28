"""lm-eval's Hugging Face model, which also notes what the cache holds while a task runs."""

from collections import defaultdict
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
from lm_eval.models.huggingface import HFLM
from torch import Tensor

from megatron_dmc.config import ConfigError
from megatron_dmc.convert.families import FAMILIES
from megatron_dmc.hf.cache import CACHE_NAME


@dataclass
class CacheUse:
    """Sums over the sequences that a model took in at once: the texts that were scored, and the prompts of generations.

    Padding does not count. ``slots`` are those of all layers and heads, ``plain_slots`` and ``plain_nbytes`` what a cache of
    every token would have.
    """

    sequences: int = 0
    tokens: int = 0
    slots: int = 0
    plain_slots: int = 0
    nbytes: int = 0
    plain_nbytes: int = 0

    def add(self, other: "CacheUse") -> None:
        for name, value in vars(other).items():
            setattr(self, name, getattr(self, name) + value)

    def report(self) -> dict[str, float]:
        """The ratio, and tokens and bytes of a sequence on average; empty where no cache was seen."""
        if not self.sequences or not self.slots:
            return {}
        return {
            "compression_ratio": self.plain_slots / self.slots,
            "cache_bytes": self.nbytes / self.sequences,
            "plain_cache_bytes": self.plain_nbytes / self.sequences,
            "tokens": self.tokens / self.sequences,
        }


class ObservedLM(HFLM):
    """Scores and generations are HFLM's. Requests run task by task, so that what the cache holds is known of each.

    Attributes:
        uses: by the task's name.
    """

    def __init__(self, *args: Any, **settings: Any) -> None:
        super().__init__(*args, **settings)
        self.uses: defaultdict[str, CacheUse] = defaultdict(CacheUse)
        self._use = CacheUse()
        self._inputs: set[tuple[int, ...]] = set()
        config = self.config.get_text_config()
        heads = getattr(config, "num_key_value_heads", None) or config.num_attention_heads
        head_dim = getattr(config, "head_dim", None) or config.hidden_size // config.num_attention_heads
        self._slots_per_token = config.num_hidden_layers * heads
        self._bytes_per_token = self._slots_per_token * 2 * head_dim * self.model.dtype.itemsize
        self._compresses = hasattr(self.config, "dmc")
        # A plain model's cache is counted, not seen. Layers with windows, or without attention, would have another.
        kinds = getattr(config, "layer_types", None) or []
        is_full = not getattr(config, "sliding_window", None) and all(kind == "full_attention" for kind in kinds)
        self._is_known = self._compresses or (config.model_type in FAMILIES and is_full)

    def loglikelihood(self, requests: list[Any], disable_tqdm: bool = False) -> list[Any]:
        return self._task_by_task(super().loglikelihood, requests, disable_tqdm)

    def loglikelihood_rolling(self, requests: list[Any], disable_tqdm: bool = False) -> list[Any]:
        return self._task_by_task(super().loglikelihood_rolling, requests, disable_tqdm)

    def generate_until(self, requests: list[Any], disable_tqdm: bool = False) -> list[Any]:
        return self._task_by_task(super().generate_until, requests, disable_tqdm)

    def get_model_info(self) -> dict[str, Any]:
        """Nothing: HFLM would ask the Hub about a local folder."""
        return {}

    def _task_by_task(self, run: Callable[..., list[Any]], requests: list[Any], disable_tqdm: bool) -> list[Any]:
        places = defaultdict(list)
        for place, request in enumerate(requests):
            places[request.task_name].append(place)
        answers: list[Any] = [None] * len(requests)
        for name, mine in places.items():
            self._use = self.uses[name]
            found = run([requests[place] for place in mine], disable_tqdm=disable_tqdm)
            for place, answer in zip(mine, found, strict=True):
                answers[place] = answer
        return answers

    def _loglikelihood_tokens(self, requests: Any, *args: Any, **options: Any) -> list[Any]:
        # As HFLM makes them, before it pads a batch of them on the right.
        self._inputs = {
            tuple((context + continuation)[-(self.max_length + 1) :][:-1]) for _, context, continuation in requests
        }
        return super()._loglikelihood_tokens(requests, *args, **options)

    def _model_call(self, inps: Tensor, attn_mask: Tensor | None = None, labels: Tensor | None = None) -> Tensor:
        """HFLM's, with a mask that keeps a batch's padding out of the compressed cache; causal attention needs none."""
        lengths = torch.tensor([self._length(row) for row in inps.tolist()], device=inps.device)
        mask = torch.arange(inps.shape[1], device=inps.device) < lengths[:, None]
        masked = {"attention_mask": mask.long()} if self._compresses and not bool(mask.all()) else {}
        dtype = self.mixed_precision_dtype
        with torch.no_grad(), torch.autocast(self.device.type, dtype=dtype, enabled=dtype is not None):
            output = self.model(inps, **masked)
        self._note(output, mask)
        return output.logits

    def _model_generate(self, context: Tensor, *args: Any, **options: Any) -> Tensor:
        mask = options.get("attention_mask", torch.ones_like(context))

        def prompt_is_in(module: Any, inputs: Any, output: Any) -> None:
            # The first call only: rows that have ended go on with padding until the last one ends.
            hook.remove()
            self._note(output, mask)

        hook = self.model.register_forward_hook(prompt_is_in)
        try:
            return super()._model_generate(context, *args, **options)
        finally:
            hook.remove()

    def _length(self, row: list[int]) -> int:
        """Tokens of a padded row: it begins with one of the inputs, and the padding may be a token of its own."""
        return next((size for size in range(len(row), 0, -1) if tuple(row[:size]) in self._inputs), len(row))

    def _note(self, output: Any, mask: Tensor) -> None:
        """What the cache holds after one call of the model; mask [batch, columns], zero at padding.

        Raises:
            ConfigError: the model's weights are damaged.
        """
        if not bool(torch.isfinite(output.logits).all()):
            raise ConfigError(
                f"{self.pretrained}: its logits are not finite; its weights are damaged, convert or fetch it again"
            )
        if not self._is_known:
            return
        tokens = int(mask.sum())
        plain_slots, plain_nbytes = tokens * self._slots_per_token, tokens * self._bytes_per_token
        slots, nbytes = plain_slots, plain_nbytes
        if self._compresses:
            cache = output.get(CACHE_NAME)
            slots, nbytes = (0, 0) if cache is None else (int(cache.slots.sum()), cache.nbytes)
        self._use.add(CacheUse(len(mask), tokens, slots, plain_slots, nbytes, plain_nbytes))
