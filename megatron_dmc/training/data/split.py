"""Which documents are trained on and which are held out."""

import hashlib
from collections import Counter
from collections.abc import Iterable

from megatron_dmc.config import ConfigError


def split_documents(documents: Iterable[str], valid_fraction: float, seed: int = 1234) -> tuple[list[str], list[str]]:
    """Parts documents into training and held-out ones, by document, the same way every time.

    Documents are visited in the order of a seeded hash of their text, and each that still fits into ``valid_fraction``
    of all bytes is held out; equal documents stay on one side. If none fits, the shortest is held out. A single
    document is cut: its last lines are held out.

    Returns:
        (training, held out), each in the given order; all of it is held in memory.

    Raises:
        ConfigError: for a fraction outside [0, 1), or a text too short to be cut.
    """
    if not 0.0 <= valid_fraction < 1.0:
        raise ConfigError(f"the held-out fraction must be in [0, 1), got {valid_fraction}")
    documents = list(documents)
    if valid_fraction == 0.0 or not documents:
        return documents, []
    sizes: Counter[str] = Counter()
    for document in documents:
        sizes[document] += len(document.encode())
    if len(sizes) == 1:
        return _cut(documents[0], valid_fraction)
    budget = valid_fraction * sizes.total()
    held_out: set[str] = set()
    for document in sorted(sizes, key=lambda text: hashlib.blake2b(f"{seed} {text}".encode()).digest()):
        if sizes[document] <= budget:
            budget -= sizes[document]
            held_out.add(document)
    if not held_out:
        held_out.add(min(sizes, key=lambda text: (sizes[text], text)))
    return (
        [document for document in documents if document not in held_out],
        [document for document in documents if document in held_out],
    )


def _cut(document: str, valid_fraction: float) -> tuple[list[str], list[str]]:
    middle = int(len(document) * (1.0 - valid_fraction))
    line_end = document.find("\n", middle, len(document) - 1) + 1
    # a text without line ends is cut between characters
    middle = line_end or middle
    if not document[:middle].strip() or not document[middle:].strip():
        raise ConfigError(
            f"the only document has {len(document)} characters, too few to hold out a fraction of {valid_fraction}; "
            "name more text"
        )
    return [document[:middle]], [document[middle:]]
