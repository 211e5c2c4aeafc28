"""Whether a model finds what stands in its prompt, through its cache."""

from typing import Any

import torch

from megatron_dmc.evaluation.exported.model import extend
from megatron_dmc.evaluation.recall_tasks import Sample


@torch.inference_mode()
def recalls(model: Any, sample: Sample) -> bool:
    """Whether greedy generation after the prompt would give exactly the answer's tokens.

    No token is generated. The prompt is taken into the cache, then the answer in one piece; every answer token must be the
    likeliest one where it is due. Each of them then follows the same tokens as in a generation, so the two agree.
    """
    answer = torch.tensor(sample.answer, device=model.device)
    logits, cache = extend(model, torch.tensor(sample.prompt), last_only=True)
    if logits[-1].argmax() != answer[0] or len(answer) == 1:
        return bool(logits[-1].argmax() == answer[0])
    logits, _ = extend(model, answer[:-1], cache)
    return bool((logits.argmax(-1) == answer[1:]).all())
