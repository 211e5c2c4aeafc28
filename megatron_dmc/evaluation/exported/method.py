"""How a model that is evaluated keeps what it has read."""

from typing import Any, Protocol

from torch import Tensor

from megatron_dmc.evaluation.exported.model import cache_bytes, extend


class Method(Protocol):
    """A model as it is (:class:`AsItIs`), or with a baseline of ``megatron_dmc/baselines``.

    Attributes:
        acts_while_reading: whether a text's loss says what the method costs: it acts before the text's end.
    """

    acts_while_reading: bool

    @property
    def attention(self) -> str | None:
        """transformers' implementation that the model is loaded with; None: its own choice."""

    def check(self, folder: str, shortest: int) -> None:
        """Before anything is loaded: raises ConfigError for what cannot be, contexts of ``shortest`` tokens included."""

    def read(self, model: Any, context: Tensor) -> tuple[Tensor, Any]:
        """Takes a context, int64 [tokens], into a new cache: logits of its last token, [1, vocabulary]; and the cache."""

    def extend(self, model: Any, tokens: Tensor, cache: Any) -> tuple[Tensor, Any]:
        """The next tokens, int64 [n]: logits [n, vocabulary], and the cache."""

    def whole(self, model: Any, tokens: Tensor) -> Tensor:
        """Logits [tokens, vocabulary] of a text of which nothing is to stay, if the method acts while it reads."""

    def slots(self, model: Any, cache: Any) -> Tensor | None:
        """int64 [layers, kv_heads]; None: as many as tokens."""

    def nbytes(self, model: Any, cache: Any) -> int:
        """Of keys and values."""


class AsItIs:
    """A plain model, or an export with its compressed cache."""

    acts_while_reading = True
    attention: str | None = None

    def check(self, folder: str, shortest: int) -> None:
        pass

    def read(self, model: Any, context: Tensor) -> tuple[Tensor, Any]:
        return extend(model, context, last_only=True)

    def extend(self, model: Any, tokens: Tensor, cache: Any) -> tuple[Tensor, Any]:
        return extend(model, tokens, cache)

    def whole(self, model: Any, tokens: Tensor) -> Tensor:
        logits: Tensor = model(tokens[None].to(model.device), use_cache=False).logits[0]
        return logits

    def slots(self, model: Any, cache: Any) -> Tensor | None:
        return cache.slots[:, 0] if hasattr(cache, "slots") else None

    def nbytes(self, model: Any, cache: Any) -> int:
        return cache_bytes(cache)
