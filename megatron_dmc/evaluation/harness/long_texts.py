"""Four long-context tasks of RULER (Hsieh et al. 2024, arXiv 2404.06654) that need no download; the prompts are RULER's.

Pure functions: a random number generator in the same state gives the same prompt.
"""

import math
import string
from collections.abc import Callable
from dataclasses import dataclass
from functools import cache
from random import Random
from typing import NamedTuple

NOISE = "The grass is green. The sky is blue. The sun is yellow. Here we go. There and back again."
HOPS = 4
COMMON_WORDS = 10
FREQUENT_WORDS = 3
# Texts of so many tokens repeat their words more often, as RULER's do.
_LONG = 4096


class Prompt(NamedTuple):
    """The model reads context and question. answer_prefix: the beginning of its answer; answers: all that the rest must
    contain. Nothing of the context says what will be asked."""

    context: str
    question: str
    answer_prefix: str
    answers: list[str]

    @property
    def text(self) -> str:
        return self.context + self.question

    @property
    def whole(self) -> str:
        return f"{self.text} {self.answer_prefix}"


@dataclass(frozen=True)
class LongText:
    """A task.

    Attributes:
        draw: from a random number generator, a size and the tokens that the text may have; the larger the size, the longer
            the text.
        least_size: the smallest size that makes a sound question.
        new_tokens: tokens that the answer may have, as in RULER.
    """

    draw: Callable[[Random, int, int], Prompt]
    least_size: int
    new_tokens: int


def niah_noise(rng: Random, size: int, tokens: int) -> Prompt:
    """A needle in a haystack: one key's number among ``size`` equal lines of noise."""
    key, number = _pair(rng.randrange(_pairs())), str(rng.randint(10**6, 10**7 - 1))
    lines = [NOISE] * size
    lines.insert(rng.randint(0, size), f"One of the special magic numbers for {key} is: {number}.")
    context = (
        "A special magic number is hidden within the following text. Make sure to memorize it. I will quiz you about the "
        f"number afterwards.\n{_lines(lines)}\n"
    )
    question = f"What is the special magic number for {key} mentioned in the provided text?"
    return Prompt(context, question, f"The special magic number for {key} mentioned in the provided text is", [number])


def variable_tracking(rng: Random, size: int, tokens: int) -> Prompt:
    """Which variables have a value, through a chain of assignments among ``size`` lines of noise; one solved example."""
    example, asked = _chain(rng, 5, letters=3), _chain(rng, size, letters=5)
    return asked._replace(context=f"{example.whole} {' '.join(example.answers)}\n\n{asked.context}")


def common_words(rng: Random, size: int, tokens: int) -> Prompt:
    """The ten words that a numbered list of ``size`` different words repeats most often; one solved example."""
    is_long = tokens >= _LONG
    example = _word_list(rng, 40 if is_long else 20, *((10, 3) if is_long else (3, 1)))
    asked = _word_list(rng, size, *((30, 3) if is_long else (6, 1)))
    solved = " ".join(f"{place}. {word}" for place, word in enumerate(example.answers, 1))
    return asked._replace(context=f"{example.whole} {solved}\n{asked.context}")


def frequent_words(rng: Random, size: int, tokens: int) -> Prompt:
    """The three most frequent coded words of about ``size``, whose frequencies fall as 1 / rank²; dots have rank 1."""
    shares = [int(size / rank**2 / (math.pi**2 / 6)) for rank in range(1, size + 1)]
    counts = [count for count in shares if count]
    coded: dict[str, None] = {}
    while len(coded) < len(counts) - 1:
        coded["".join(rng.choices(string.ascii_lowercase, k=6))] = None
    ranked = ["...", *coded]
    words = [word for word, count in zip(ranked, counts, strict=True) for _ in range(count)]
    rng.shuffle(words)
    context = (
        "Read the following coded text and track the frequency of each coded word. Find the three most frequently appeared "
        f"coded words. {' '.join(words)}\n"
    )
    question = (
        "Question: Do not provide any explanation. Please ignore the dots '....'. What are the three most frequently appeared "
        "words in the above coded text?"
    )
    prefix = "Answer: According to the coded text above, the three most frequently appeared words are:"
    return Prompt(context, question, prefix, ranked[1 : FREQUENT_WORDS + 1])


LONG_TEXTS = {
    "dmc_niah_noise": LongText(niah_noise, least_size=1, new_tokens=128),
    "dmc_vt": LongText(variable_tracking, least_size=1, new_tokens=30),
    "dmc_cwe": LongText(common_words, least_size=COMMON_WORDS + 1, new_tokens=120),
    # With fewer words the fourth rank, the last that is asked for, and the fifth may appear equally often.
    "dmc_fwe": LongText(frequent_words, least_size=53, new_tokens=50),
}


def _chain(rng: Random, size: int, letters: int) -> Prompt:
    names: dict[str, None] = {}
    while len(names) < HOPS + 1:
        names["".join(rng.choices(string.ascii_uppercase, k=letters))] = None
    variables, value = list(names), rng.randint(10000, 99999)
    assigned = [str(value), *(f"VAR {name}" for name in variables)]
    lines = [NOISE] * size
    places = sorted(rng.randint(0, size) for _ in variables)
    # From the last on: an earlier line's place is not moved by a later one.
    for place, name, known in reversed(list(zip(places, variables, assigned, strict=False))):
        lines.insert(place, f"VAR {name} = {known}")
    context = (
        f"Memorize and track the chain(s) of variable assignment hidden in the following text.\n\n{_lines(lines)}\n"
    )
    question = f"Question: Find all variables that are assigned the value {value} in the text above."
    # The misspelling is RULER's.
    prefix = (
        f"Answer: According to the chain(s) of variable assignment in the text above, {HOPS + 1} variables are assgined the "
        f"value {value}, they are:"
    )
    return Prompt(context, question, prefix, variables)


def _word_list(rng: Random, size: int, common_repeats: int, other_repeats: int) -> Prompt:
    words = _different_words(rng, size)
    common, others = words[:COMMON_WORDS], words[COMMON_WORDS:]
    listed = common * common_repeats + others * other_repeats
    rng.shuffle(listed)
    context = (
        "Below is a numbered list of words. In these words, some appear more often than others. Memorize the ones that appear "
        f"most often.\n{' '.join(f'{place}. {word}' for place, word in enumerate(listed, 1))}\n"
    )
    question = "Question: What are the 10 most common words in the above list?"
    return Prompt(context, question, "Answer: The top 10 words that appear most often in the list are:", common)


def _different_words(rng: Random, count: int) -> list[str]:
    """English words; pairs of them once there are no more, so that a text may have any length."""
    words = _vocabulary()
    if count <= len(words):
        return rng.sample(words, count)
    pairs = rng.sample(range(_pairs()), count - len(words))
    return rng.sample(words, len(words)) + [_pair(number) for number in pairs]


@cache
def _parts_of_speech() -> tuple[list[str], list[str], list[str]]:
    from wonderwords import RandomWord

    made = RandomWord()
    # Not "ad hoc", which would read as two words of a list.
    nouns, adjectives, verbs = (
        sorted({word for word in made.filter(include_parts_of_speech=[part]) if word.isalpha()})
        for part in ("nouns", "adjectives", "verbs")
    )
    return nouns, adjectives, verbs


@cache
def _vocabulary() -> list[str]:
    return sorted({word for words in _parts_of_speech() for word in words})


def _pairs() -> int:
    nouns, adjectives, _ = _parts_of_speech()
    return len(nouns) * len(adjectives)


def _pair(number: int) -> str:
    nouns, adjectives, _ = _parts_of_speech()
    return f"{adjectives[number // len(nouns)]}-{nouns[number % len(nouns)]}"


def _lines(lines: list[str]) -> str:
    return "\n".join(lines)
