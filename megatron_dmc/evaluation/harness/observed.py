"""lm-eval's Hugging Face model, which also notes what the cache holds while a task runs."""

from collections import defaultdict
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from lm_eval.models.huggingface import HFLM
from torch import Tensor

from megatron_dmc.config import ConfigError
from megatron_dmc.convert.families import FAMILIES
from megatron_dmc.evaluation.exported.method import Method
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

    Args:
        baseline: how a plain model keeps what it has read, in generations. Their documents then have a ``context``, with which
            the prompt begins; what follows it is read once the context has been compressed.

    Attributes:
        uses: by the task's name.
        answers: by the task's name, documents and what was generated for them.
    """

    def __init__(self, *args: Any, baseline: Method | None = None, **settings: Any) -> None:
        attention = None if baseline is None else baseline.attention
        super().__init__(*args, **({} if attention is None else {"attn_implementation": attention}), **settings)
        self.uses: defaultdict[str, CacheUse] = defaultdict(CacheUse)
        self.answers: defaultdict[str, list[tuple[dict[str, Any], str]]] = defaultdict(list)
        self._use = CacheUse()
        self._inputs: set[tuple[int, ...]] = set()
        self._baseline = baseline
        # Of a prompt by its tokens: how many of them are its context.
        self._borders: dict[tuple[int, ...], int] = {}
        config = self.config.get_text_config()
        self._slots_per_token, self._bytes_per_token = plain_sizes(config, self.model.dtype)
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
        if self._baseline is not None:
            self._borders = {}
            for request in requests:
                tokens = self._tokens(request.args[0])
                self._borders[tuple(tokens)] = common_length(self._tokens(request.doc["context"]), tokens)
        found = self._task_by_task(super().generate_until, requests, disable_tqdm)
        for request, answer in zip(requests, found, strict=True):
            self.answers[request.task_name].append((request.doc, answer))
        return found

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
        self._note(output.logits, mask, self._held(output))
        return output.logits

    def _model_generate(self, context: Tensor, *args: Any, **options: Any) -> Tensor:
        if self._baseline is not None:
            # Stop strings, lengths and penalties stay generate()'s; only the steps are others.
            with torch.inference_mode():
                return super()._model_generate(context, *args, custom_generate=self._with_baseline, **options)
        mask = options.get("attention_mask", torch.ones_like(context))

        def prompt_is_in(module: Any, inputs: Any, output: Any) -> None:
            # The first call only: rows that have ended go on with padding until the last one ends.
            hook.remove()
            self._note(output.logits, mask, self._held(output))

        hook = self.model.register_forward_hook(prompt_is_in)
        try:
            return super()._model_generate(context, *args, **options)
        finally:
            hook.remove()

    def _length(self, row: list[int]) -> int:
        """Tokens of a padded row: it begins with one of the inputs, and the padding may be a token of its own."""
        return next((size for size in range(len(row), 0, -1) if tuple(row[:size]) in self._inputs), len(row))

    def _with_baseline(
        self, model: Any, input_ids: Tensor, logits_processor: Any, stopping_criteria: Any, **_: Any
    ) -> Tensor:
        """Greedy steps as generate() takes them, int64 [1, tokens] to a longer one: the context by itself, which the baseline
        compresses, then the question in one piece, then the answer."""
        assert self._baseline is not None
        border = self._borders.get(tuple(input_ids[0].tolist()))
        if border is None:
            raise ConfigError(
                f"a prompt and its answer are longer than the {self.max_length} tokens that {self.pretrained} reads at once; "
                "a baseline takes whole prompts only"
            )
        logits, cache = read_in_two(self._baseline, model, input_ids[0], border)
        plain_slots = input_ids.numel() * self._slots_per_token
        self._note(logits, torch.ones_like(input_ids), held_by(self._baseline, model, cache, plain_slots))
        while True:
            scores = logits_processor(input_ids, logits[-1:].float())
            token = scores.argmax(-1)
            input_ids = torch.cat([input_ids, token[:, None]], dim=1)
            if bool(stopping_criteria(input_ids, scores).all()):
                return input_ids
            logits, cache = self._baseline.extend(model, token, cache)

    def _tokens(self, text: str) -> list[int]:
        """As HFLM reads the prompt of a generation."""
        return self.tok_batch_encode([text])[0][0].tolist()

    def _held(self, output: Any) -> tuple[int, int] | None:
        """Slots and bytes of the cache after one call of the model; None: those of every token."""
        if not self._compresses:
            return None
        cache = output.get(CACHE_NAME)
        return (0, 0) if cache is None else (int(cache.slots.sum()), cache.nbytes)

    def _note(self, logits: Tensor, mask: Tensor, held: tuple[int, int] | None) -> None:
        """What the cache holds after one call of the model; mask [batch, columns], zero at padding.

        Raises:
            ConfigError: the model's weights are damaged.
        """
        if not bool(torch.isfinite(logits).all()):
            raise ConfigError(
                f"{self.pretrained}: its logits are not finite; its weights are damaged, convert or fetch it again"
            )
        if not self._is_known:
            return
        tokens = int(mask.sum())
        plain = tokens * self._slots_per_token, tokens * self._bytes_per_token
        slots, nbytes = plain if held is None else held
        self._use.add(CacheUse(len(mask), tokens, slots, plain[0], nbytes, plain[1]))


def plain_sizes(config: Any, dtype: torch.dtype) -> tuple[int, int]:
    """Slots and bytes of a token in a cache that keeps every one, over all layers and KV heads."""
    heads = getattr(config, "num_key_value_heads", None) or config.num_attention_heads
    head_dim = getattr(config, "head_dim", None) or config.hidden_size // config.num_attention_heads
    slots = config.num_hidden_layers * heads
    return slots, slots * 2 * head_dim * dtype.itemsize


def held_by(method: Method, model: Any, cache: Any, plain_slots: int) -> tuple[int, int]:
    """Slots and bytes of a cache. A method that keeps every token may have made the slots smaller."""
    slots = method.slots(model, cache)
    return plain_slots if slots is None else int(slots.sum()), method.nbytes(model, cache)


def read_in_two(method: Method, model: Any, prompt: Tensor, border: int) -> tuple[Tensor, Any]:
    """A prompt, int64 [tokens], of which the first ``border`` are the context: logits of its last token, [1, vocabulary], and
    the cache."""
    logits, cache = method.read(model, prompt[:border])
    if border < len(prompt):
        logits, cache = method.extend(model, prompt[border:], cache)
    return logits[-1:], cache


def common_length(one: Sequence[int], other: Sequence[int]) -> int:
    """Of what both begin with. A token of a whole that reaches across the end of its first part belongs to the second."""
    return next((i for i, (a, b) in enumerate(zip(one, other, strict=False)) if a != b), min(len(one), len(other)))
