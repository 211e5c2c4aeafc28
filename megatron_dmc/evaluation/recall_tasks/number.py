"""A number in real text."""

from megatron_dmc.evaluation.recall_tasks.sample import Sample, Source, once

_NAMES = ("Anna", "Marek", "Lucia", "Tobias", "Yuki", "Omar", "Ingrid", "Paulo")


def make(source: Source) -> Sample:
    """Four digits that stand nowhere else, at a random place. The prompt has exactly ``source.tokens`` tokens."""
    name = source.random.choice(_NAMES)
    key = f" {source.random.randint(1000, 9999)}"
    needle = source.plain(f"\n\n{name}'s secret number is{key}.\n\n")
    question, answer = source.question(f"\n\nQuestion: what is {name}'s secret number?\n{name}'s secret number is", key)
    text = source.stretch(source.room(len(source.opening) + len(needle) + len(question), "number"))
    cut = source.random.randint(0, len(text))
    return once([*source.opening, *text[:cut], *needle, *text[cut:], *question], answer, len(question))
