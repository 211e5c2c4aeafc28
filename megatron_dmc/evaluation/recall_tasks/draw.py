"""The samples of a recall task: the same for every model with the same tokenizer."""

import random

import numpy

from megatron_dmc.config import ConfigError
from megatron_dmc.data.tokenizer import Tokenizer
from megatron_dmc.evaluation.recall_tasks import copying, lookup, number, passkey
from megatron_dmc.evaluation.recall_tasks.sample import Maker, Sample, Source, Unfit

# {name in tables: what makes one sample}
TASKS: dict[str, Maker] = {
    "passkey": passkey.make,
    "number": number.make,
    "lookup": lookup.make,
    "copy": copying.make,
}
# Draws before a text is called unfit for a task.
_MOST_DRAWS = 1000


def draw(task: str, tokenizer: Tokenizer, text: numpy.ndarray, tokens: int, index: int) -> Sample:
    """Sample ``index`` of a task, with a prompt of ``tokens`` tokens. Its name, its length and its index decide it.

    Args:
        text: held-out text, int64 [tokens].

    Raises:
        ConfigError: so few tokens hold no such task, or the text holds nothing that could be asked for.
    """
    for attempt in range(_MOST_DRAWS):
        try:
            return TASKS[task](Source(tokenizer, text, tokens, random.Random(f"{task} {tokens} {index} {attempt}")))
        except Unfit:
            pass
    raise ConfigError(f"the held-out text holds nothing that the recall task {task} could ask for; hold out more text")
