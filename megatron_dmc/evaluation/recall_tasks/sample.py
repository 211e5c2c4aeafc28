"""One sample of a recall task, and what all tasks are made from."""

import random
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import NamedTuple

import numpy

from megatron_dmc.config import ConfigError
from megatron_dmc.data.tokenizer import Tokenizer

# Tokens of text, beside question and answer, that a recall task needs.
LEAST_ROOM = 40


class Unfit(Exception):
    """What was drawn is no sample: the next draw may be one."""


class Sample(NamedTuple):
    """Token ids. The answer follows the prompt, and stands in it once, at ``place``. The prompt's last ``question`` tokens ask
    for it."""

    prompt: list[int]
    answer: list[int]
    place: int
    question: int = 0


@dataclass(frozen=True)
class Source:
    """What a sample is made from.

    Attributes:
        tokenizer: the model's.
        text: real text for the tasks that hide something in it, int64 [tokens].
        tokens: of a prompt, at most; a task of whole lines may stay a few short.
        random: decides everything that is free.
    """

    tokenizer: Tokenizer
    text: numpy.ndarray
    tokens: int
    random: random.Random

    @property
    def opening(self) -> list[int]:
        """What the tokenizer puts before a text."""
        return list(self.tokenizer.added_tokens[0])

    def plain(self, text: str) -> list[int]:
        """The tokens of a part of a text, without what opens and closes a whole one."""
        ids = self.tokenizer.tokenize(text)
        before, after = self.tokenizer.added_tokens
        return ids[len(before) : len(ids) - len(after)]

    def question(self, question: str, answer: str) -> tuple[list[int], list[int]]:
        """The tokens of both, one after the other. A token that reaches across the border belongs to the answer."""
        asked, whole = self.plain(question), self.plain(question + answer)
        border = next((i for i, (a, b) in enumerate(zip(asked, whole, strict=False)) if a != b), len(asked))
        return whole[:border], whole[border:]

    def stretch(self, tokens: int) -> list[int]:
        """So many tokens of the real text, from anywhere in it.

        Raises:
            ConfigError: the text has fewer.
        """
        if len(self.text) < tokens:
            raise ConfigError(
                f"the held-out text has {len(self.text)} tokens, a recall task reads {tokens} of them; hold out more text"
            )
        begin = self.random.randrange(len(self.text) - tokens + 1)
        return [int(token) for token in self.text[begin : begin + tokens]]

    def room(self, used: int, task: str) -> int:
        """Tokens that are left of a prompt for what something is hidden in.

        Raises:
            ConfigError: fewer than LEAST_ROOM.
        """
        left = self.tokens - used
        if left < LEAST_ROOM:
            raise ConfigError(f"the recall task {task} takes {used + LEAST_ROOM} tokens or more, not {self.tokens}")
        return left


Maker = Callable[[Source], Sample]


def occurrences(part: Sequence[int], whole: Sequence[int]) -> list[int]:
    """Where ``part`` begins in ``whole``."""
    size = len(part)
    return [i for i in range(len(whole) - size + 1) if list(whole[i : i + size]) == list(part)]


def once(prompt: list[int], answer: list[int], question: int = 0) -> Sample:
    """The sample, if the answer stands in the prompt once. question: tokens of the prompt's end that ask.

    Raises:
        Unfit: it stands there several times, by chance.
    """
    found = occurrences(answer, prompt)
    if len(found) != 1:
        raise Unfit
    return Sample(prompt, answer, found[0], question)
