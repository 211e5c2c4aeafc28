"""Losses of a model on held-out text, and how far its predictions are from its base's."""

from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import Tensor

from megatron_dmc.evaluation.exported.method import Method

QUARTERS = 4
# Tokens at a text's end that are predicted from a context in the cache.
CONTINUED = 64


@torch.inference_mode()
def text_loss(
    model: Any, base: Any | None, windows: Sequence[Tensor], method: Method, advance: Callable[[int], None]
) -> dict[str, Any]:
    """Loss and KL(base || model) in nats per token, in all and by quarter of a window.

    Args:
        base: None: the model is the base; no divergence is reported.
        windows: int64 [tokens + 1] each; every token but the first is predicted.
        method: how the model keeps what it reads.
        advance: is told of tokens that have been read.

    Returns:
        loss, loss_by_quarter; and kl, kl_by_quarter.
    """
    losses, divergences = [], []
    for window in windows:
        predicted = method.whole(model, window[:-1]).float().log_softmax(-1)
        window = window.to(predicted.device)
        losses.append(-predicted.gather(1, window[1:, None])[:, 0])
        if base is not None:
            wanted = _log_probabilities(base, window)
            divergences.append((wanted.exp() * (wanted - predicted)).sum(-1))
        advance(len(window) * (1 if base is None else 2))
    found = _summary("loss", torch.stack(losses))
    return found if base is None else found | _summary("kl", torch.stack(divergences))


@torch.inference_mode()
def copying_loss(model: Any, windows: Sequence[Tensor], method: Method, advance: Callable[[int], None]) -> float:
    """Nats per token on the second half of windows whose halves are equal; its first token, which nothing foretells, left out.

    Args:
        windows: int64 [tokens] each, the first half of the text; it is read twice.
        method, advance: as :func:`text_loss`'s.
    """
    losses = []
    for half in windows:
        predicted = method.whole(model, torch.cat([half, half])[:-1]).float().log_softmax(-1)
        half = half.to(predicted.device)
        losses.append(-predicted[len(half) :].gather(1, half[1:, None])[:, 0])
        advance(2 * len(half))
    return float(torch.stack(losses).double().mean())


@torch.inference_mode()
def continued_loss(
    model: Any, base: Any, windows: Sequence[Tensor], method: Method, advance: Callable[[int], None]
) -> dict[str, Any]:
    """Loss, and KL(base || model), of a text's last CONTINUED tokens, in nats per token, once what is before them is in the
    cache. So methods can be compared that compress a context after it was read.

    Args:
        base: None: the model is the base; no divergence is reported.
        windows: int64 [tokens] each.
        method: how the model keeps the context.
        advance: as :func:`text_loss`'s.
    """
    losses, divergences = [], []
    for window in windows:
        logits, cache = method.read(model, window[:-CONTINUED])
        more, _ = method.extend(model, window[-CONTINUED:-1], cache)
        predicted = torch.cat([logits[-1:], more]).float().log_softmax(-1)
        due = window[-CONTINUED:].to(predicted.device)
        losses.append(-predicted.gather(1, due[:, None])[:, 0])
        if base is not None:
            wanted = _log_probabilities(base, window, CONTINUED)
            divergences.append((wanted.exp() * (wanted - predicted)).sum(-1))
        advance(len(window) * (1 if base is None else 2))
    found = {"loss": float(torch.stack(losses).double().mean())}
    return found if base is None else found | {"kl": float(torch.stack(divergences).double().mean())}


def _log_probabilities(model: Any, window: Tensor, last: int = 0) -> Tensor:
    """float32 [tokens - 1, vocabulary], on the model's device: of every token but the first, or of so many last ones."""
    made = model(window[None, :-1].to(model.device), use_cache=False, logits_to_keep=last)
    return made.logits[0].float().log_softmax(-1)


def _summary(name: str, values: Tensor) -> dict[str, Any]:
    """values [windows, tokens], as means."""
    quarters = values.double().mean(0).unflatten(0, (QUARTERS, -1)).mean(1)
    return {name: float(quarters.mean()), f"{name}_by_quarter": quarters.tolist()}
