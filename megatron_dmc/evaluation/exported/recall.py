"""Whether a model finds what stands in its prompt, through its cache."""

from typing import Any

import torch

from megatron_dmc.evaluation.exported.method import AsItIs, Method
from megatron_dmc.evaluation.recall_tasks import Sample


@torch.inference_mode()
def recalls(model: Any, sample: Sample, method: Method | None = None) -> bool:
    """Whether greedy generation after the prompt would give exactly the answer's tokens.

    No token is generated. What the question is about is read first: a method that compresses afterwards does not know yet what
    will be asked. Then come the question and the answer, each in one piece; every answer token must be the likeliest one where
    it is due. Each of them then follows the same tokens as in a generation, so the two agree.

    Args:
        method: None: the model as it is.
    """
    method = AsItIs() if method is None else method
    answer = torch.tensor(sample.answer, device=model.device)
    border = len(sample.prompt) - sample.question
    logits, cache = method.read(model, torch.tensor(sample.prompt[:border]))
    for more in (sample.prompt[border:], sample.answer[:-1]):
        if more:
            logits, cache = _joined(logits, method.extend(model, torch.tensor(more), cache))
    return bool((logits[-len(answer) :].argmax(-1) == answer).all())


def _joined(before: torch.Tensor, after: tuple[torch.Tensor, Any]) -> tuple[torch.Tensor, Any]:
    """The last logits before a piece, and those of the piece."""
    logits, cache = after
    return torch.cat([before[-1:], logits]), cache
