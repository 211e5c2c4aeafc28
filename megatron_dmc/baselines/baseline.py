"""What every baseline is asked for; ``evaluation/exported/method.py: Method`` is the same for a model with no baseline."""

from abc import ABC, abstractmethod
from pathlib import Path
from typing import Any, NamedTuple

import torch
from torch import Tensor

from megatron_dmc.config import ConfigError
from megatron_dmc.convert.hf_config import read_config
from megatron_dmc.hf.cache import CACHE_NAME


class Kept(NamedTuple):
    """A cache that keeps a part of what it was given.

    Attributes:
        cache: transformers' own.
        tokens: that were read; more than the cache holds, and the next one's position.
    """

    cache: Any
    tokens: int


class Baseline(ABC):
    """A way to keep less of what a plain model has read. It is applied to a context in the cache; what follows, a
    question and its answer, is kept whole. Its dataclass' fields go into reports.
    """

    # If nothing is dropped while a text is read, its loss there says nothing.
    acts_while_reading = False

    @property
    @abstractmethod
    def name(self) -> str:
        """In tables."""

    @property
    def attention(self) -> str:
        """transformers' implementation that it needs."""
        return "sdpa"

    def check(self, folder: str, shortest: int) -> None:
        """Before anything is loaded.

        Args:
            shortest: tokens of the shortest context.

        Raises:
            ConfigError: the folder holds no plain model, or the method cannot be applied to it.
        """
        _, dmc = read_config(Path(folder))
        if dmc is not None:
            raise ConfigError(
                f"--baseline {self.name} takes a plain model, {folder} is an export that merges; name its base"
            )

    @abstractmethod
    def read(self, model: Any, context: Tensor) -> tuple[Tensor, Kept]:
        """Takes a context, int64 [tokens], into a new cache and compresses it there.

        Returns:
            logits of its last token, [1, vocabulary]; and the cache.
        """

    def extend(self, model: Any, tokens: Tensor, kept: Kept) -> tuple[Tensor, Kept]:
        """The next tokens, int64 [n]: logits [n, vocabulary], and the cache, which has taken them in."""
        positions = torch.arange(kept.tokens, kept.tokens + len(tokens), device=model.device)[None]
        made = model(tokens[None].to(model.device), use_cache=True, position_ids=positions, **{CACHE_NAME: kept.cache})
        return made.logits[0], Kept(made[CACHE_NAME], kept.tokens + len(tokens))

    def whole(self, model: Any, tokens: Tensor) -> Tensor:
        """Of one that acts while it reads, see Method."""
        raise NotImplementedError(f"{self.name} compresses what has been read")

    @abstractmethod
    def slots(self, model: Any, kept: Kept) -> Tensor | None:
        """That are kept, int64 [layers, kv_heads]; None: as many as tokens."""

    @abstractmethod
    def nbytes(self, model: Any, kept: Kept) -> int:
        """Of the keys and values that are kept. Whether memory is really freed is the method's own affair."""
