"""Methods that need no training, as kvpress applies them while tokens are generated: again and again, to so many slots."""

from dataclasses import dataclass
from math import ceil
from typing import Any

import torch
from torch import Tensor
from transformers import DynamicCache

from megatron_dmc.baselines.baseline import Kept
from megatron_dmc.baselines.press import Press
from megatron_dmc.baselines.presses import PIECEWISE

# Tokens between two compressions.
PIECE = 64


@dataclass(frozen=True)
class PiecewisePress(Press):
    """A press of kvpress that acts while a text is read: after every PIECE tokens the cache is cut down to the slots that the
    whole text is to have. What comes before it is that long is kept whole.

    The text is read in pieces, each by one pass, which is what generating its tokens one by one would leave. What follows a
    context, a question and its answer, is kept whole.

    Attributes:
        compression_ratio: tokens of a text per slot at its end.
        press: one of PIECEWISE.
    """

    press: str = "piecewise_tova"

    acts_while_reading = True

    @torch.inference_mode()
    def read(self, model: Any, context: Tensor) -> tuple[Tensor, Kept]:
        logits, kept = self._pieces(model, context)
        return logits[-1][-1:], kept

    @torch.inference_mode()
    def whole(self, model: Any, tokens: Tensor) -> Tensor:
        return torch.cat(self._pieces(model, tokens)[0])

    def _pieces(self, model: Any, tokens: Tensor) -> tuple[list[Tensor], Kept]:
        """Logits of each piece, [n, vocabulary]."""
        import kvpress

        for layer in model.model.layers:
            layer.self_attn.hidden = None
        target = ceil(len(tokens) / self.compression_ratio)
        press = kvpress.DecodingPress(
            PIECEWISE[self.press](kvpress), compression_interval=1, target_size=target, hidden_states_buffer_size=PIECE
        )
        logits, kept = [], Kept(DynamicCache(), 0)
        # The first one is shorter, since a press wants to see so many tokens.
        first = len(tokens) % PIECE or PIECE
        with press(model):
            for piece in (tokens[:first], *tokens[first:].split(PIECE)):
                made, kept = self.extend(model, piece, kept)
                logits.append(made)
        return logits, kept
