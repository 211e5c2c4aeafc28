"""Real text, a part of which begins again at the end: what followed it the first time?"""

from megatron_dmc.evaluation.recall_tasks.sample import Sample, Source, Unfit, occurrences, once

CUE_TOKENS, ANSWER_TOKENS = 32, 4


def make(source: Source) -> Sample:
    """The answer stands once in the text, after the one place where the cue stands. Exactly ``source.tokens`` tokens."""
    text = source.stretch(source.room(len(source.opening) + CUE_TOKENS, "copy"))
    begin = source.random.randrange(len(text) - CUE_TOKENS - ANSWER_TOKENS)
    border = begin + CUE_TOKENS
    cue, answer = text[begin:border], text[border : border + ANSWER_TOKENS]
    if occurrences(cue, text) != [begin]:
        raise Unfit
    return once([*source.opening, *text, *cue], answer, len(cue))
