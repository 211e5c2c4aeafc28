"""Bytes that a text's cache really holds, beside a plain cache's."""

from dataclasses import dataclass

from torch import Tensor

from megatron_dmc.config import ConfigError
from megatron_dmc.inference.context import DMCInferenceContext
from megatron_dmc.inference.generate import forward
from megatron_dmc.inference.loading import LoadedModel

# A layer that keeps fewer than one in a hundred of the tokens that its decisions were about has given up on them.
MERGES_EVERYTHING_BELOW = 0.01


@dataclass(frozen=True)
class CacheSize:
    """tokens read; slots [layers, kv_heads] they became; bytes held for them, and by a plain cache of the same dtype.

    window: the last tokens, which stay as they are (``dmc.local_window``).
    residual: slots of a head that hold what was absorbed, 0 or 1.
    """

    tokens: int
    slots: Tensor
    cache_bytes: int
    plain_cache_bytes: int
    window: int = 0
    residual: int = 0

    @property
    def layer_head_ratio(self) -> Tensor:
        return self.tokens / self.slots.double()

    @property
    def compression_ratio(self) -> float:
        return self.tokens * self.slots.numel() / float(self.slots.sum())

    @property
    def layer_ratio(self) -> Tensor:
        """[layers]"""
        return self.tokens / self.slots.double().mean(1)

    @property
    def layers_that_merge_everything(self) -> list[int]:
        """Layers whose ratio is near the highest possible one; empty for a text that is too short to tell."""
        # The first token is always kept.
        decided = self.tokens - self.window - 1
        if decided * MERGES_EVERYTHING_BELOW < 1:
            return []
        kept = (self.slots.double().mean(1) - self.window - self.residual - 1) / decided
        return (kept < MERGES_EVERYTHING_BELOW).nonzero()[:, 0].tolist()


def plain_cache_bytes(loaded: LoadedModel, tokens: int) -> int:
    """Keys and values of every layer and KV head in the model's dtype."""
    model = loaded.recipe.model
    element = next(loaded.model.parameters()).element_size()
    return 2 * model.num_layers * model.num_query_groups * model.head_dim * element * tokens


def measure_cache(loaded: LoadedModel, tokens: Tensor) -> CacheSize:
    """Fills the compressed cache with one text, tokens [seq].

    Raises:
        ConfigError: the text is longer than what the model was trained for; its decisions would mean nothing.
    """
    most = loaded.recipe.model.max_position_embeddings
    if len(tokens) > most:
        raise ConfigError(f"the text's {len(tokens)} tokens exceed the model's {most} positions; read fewer (--tokens)")
    context = DMCInferenceContext(loaded.recipe.dmc, len(tokens), only_last_logits=True)
    forward(loaded, tokens[None], context)
    return CacheSize(
        tokens=len(tokens),
        slots=context.slots[:, 0].cpu(),
        cache_bytes=context.nbytes,
        plain_cache_bytes=plain_cache_bytes(loaded, len(tokens)),
        window=loaded.recipe.dmc.local_window,
        residual=int(loaded.recipe.dmc.absorbs),
    )
