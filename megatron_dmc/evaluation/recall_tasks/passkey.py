"""A number in a text that repeats itself (as in Mohtashami and Jaggi, arXiv 2305.16300)."""

from megatron_dmc.evaluation.recall_tasks.sample import Sample, Source, once

_FILLER = "The grass is green. The sky is blue. The sun is yellow. Here we go. There and back again. "
_OPENING = "There is a pass key hidden in the text. Remember it.\n"
_QUESTION = "\nWhat is the pass key? The pass key is"


def make(source: Source) -> Sample:
    """Five digits, after a random number of whole sentences. The prompt has exactly ``source.tokens`` tokens."""
    key = f" {source.random.randint(10_000, 99_999)}"
    filler = source.plain(_FILLER)
    opening = source.opening + source.plain(_OPENING)
    needle = source.plain(f"The pass key is{key}. Remember it. ")
    question, answer = source.question(_QUESTION, key)
    room = source.room(len(opening) + len(needle) + len(question), "passkey")
    before = filler * source.random.randint(0, room // len(filler))
    after = (filler * (room // len(filler) + 1))[: room - len(before)]
    return once([*opening, *before, *needle, *after, *question], answer, len(question))
