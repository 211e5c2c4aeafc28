"""Prompts of a long-context task that fill a length, counted in a model's tokens."""

from collections.abc import Callable
from random import Random

from megatron_dmc.config import ConfigError
from megatron_dmc.evaluation.harness.long_texts import LONG_TEXTS, Prompt

# A text that turns out longer than the first one of its size loses so much of its size, until it fits.
_STEP = 0.02


def long_prompts(name: str, tokens: int, count: int, seed: int, measure: Callable[[str], int]) -> list[Prompt]:
    """So many prompts which, with their answers, have ``tokens`` tokens, or a little fewer.

    A prompt depends on its number, the seed, the task and the length only: the first of 500 are the first of 100.

    Args:
        name: of LONG_TEXTS.
        measure: tokens of a text, those that the tokenizer adds included.

    Raises:
        ConfigError: the task's smallest prompt is longer.
    """
    task = LONG_TEXTS[name]
    room = tokens - task.new_tokens

    def draw(index: int, size: int) -> Prompt | None:
        """None where it is too long."""
        prompt = task.draw(Random(f"{seed} {name} {tokens} {index}"), size, tokens)
        return prompt if measure(prompt.whole) <= room else None

    largest = _largest(lambda size: draw(0, size) is not None, task.least_size)
    if largest is None:
        smallest = task.draw(Random(f"{seed} {name} {tokens} 0"), task.least_size, tokens)
        least = measure(smallest.whole) + task.new_tokens
        raise ConfigError(
            f"{name} needs texts of about {least} tokens or more with this tokenizer, got length {tokens}"
        )
    prompts = []
    for index in range(count):
        size = largest
        while (prompt := draw(index, size)) is None:
            if size == task.least_size:
                raise ConfigError(
                    f"{name}: sample {index} does not fit into {tokens} tokens with this tokenizer; ask for a larger length"
                )
            size = max(task.least_size, min(size - 1, int(size * (1 - _STEP))))
        prompts.append(prompt)
    return prompts


def _largest(fits: Callable[[int], bool], least: int) -> int | None:
    """The largest size that fits, if all smaller ones do; None where the least does not."""
    if not fits(least):
        return None
    low, high = least, 2 * least
    while fits(high):
        low, high = high, 2 * high
    while high - low > 1:
        middle = (low + high) // 2
        low, high = (middle, high) if fits(middle) else (low, middle)
    return low
