"""Names with numbers, line by line; one of them is asked for."""

from megatron_dmc.evaluation.recall_tasks.sample import Sample, Source, once

_OPENING = "A list of names and numbers.\n"


def make(source: Source) -> Sample:
    """Every name and every number stands once. As many whole lines as fit into ``source.tokens``, two at least."""
    opening = source.opening + source.plain(_OPENING)
    # The longest line that can be asked for must fit as the question, too.
    names: dict[str, str] = {}
    lines: list[list[int]] = []
    longest = 0
    room = source.room(len(opening), "lookup")
    while True:
        name, value = _name(source), f" {source.random.randint(1000, 9999)}"
        line = source.plain(f"{name}:{value}\n")
        if name in names or value in names.values():
            continue
        longest = max(longest, len(line))
        if len(lines) >= 2 and sum(map(len, lines)) + len(line) + longest + 1 > room:
            break
        names[name] = value
        lines.append(line)
    asked = source.random.choice(list(names))
    question, answer = source.question(f"\n{asked}:", names[asked])
    return once([*opening, *(token for line in lines for token in line), *question], answer, len(question))


def _name(source: Source) -> str:
    syllables = (source.random.choice("bdfgklmnprstvz") + source.random.choice("aeiou") for _ in range(3))
    return "".join(syllables).capitalize()
