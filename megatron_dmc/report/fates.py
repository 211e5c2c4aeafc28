"""What becomes of each token of a text, by the decisions of a KV head. Nothing here needs torch."""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import NamedTuple


class Fate(NamedTuple):
    """What has become of a token once the whole text is read.

    Attributes:
        kind: k: it has a slot of its own. m: it was merged into ``slot``. e: it was evicted. a: it was absorbed into the
            residual slot. w: it is still in the window, and its decision has not taken effect. In upper case where alpha is 1.
        slot: its number, from 1; 0: none.
    """

    kind: str
    slot: int


@dataclass(frozen=True)
class Decisions:
    """Of one text.

    Attributes:
        model: the folder that was read.
        source: what the text is, in words.
        tokens: the text of each, which may be hostile.
        fates: [layers][kv_heads][tokens].
        heads: tokens per slot, [layers][kv_heads].
    """

    model: str
    source: str
    window: int
    operation: str
    tokens: Sequence[str]
    fates: Sequence[Sequence[Sequence[Fate]]]
    heads: Sequence[Sequence[float]]


def fates(alpha: Sequence[bool], window: int, operation: str) -> list[Fate]:
    """Of one KV head's decisions, by the rules of ``ops/decode/naive.py: decode``."""
    found, slots = [], 0
    for token, merges in enumerate(alpha):
        kind, slot = "w", 0
        # A first token has nothing to merge into.
        if token < len(alpha) - window and (slots == 0 or not merges):
            slots += 1
            kind, slot = "k", slots
        elif token < len(alpha) - window:
            kind, slot = operation[0], slots if operation == "merge" else 0
        found.append(Fate(kind.upper() if merges else kind, slot))
    return found


def slots(found: Sequence[Fate]) -> int:
    """That a head holds: of kept tokens, of the window, and the residual one."""
    kinds = [fate.kind.lower() for fate in found]
    return kinds.count("k") + kinds.count("w") + ("a" in kinds)
