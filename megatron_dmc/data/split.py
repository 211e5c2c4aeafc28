"""Which documents are trained on and which are held out."""

import hashlib
import logging
from collections import Counter
from collections.abc import Callable, Iterable
from typing import TypeVar

from megatron_dmc.config import ConfigError

Document = TypeVar("Document")

logger = logging.getLogger(__name__)

# Held-out documents whose mean size is below this share of the others' do not stand for them.
_REPRESENTATIVE = 0.5


def split_documents(
    documents: Iterable[Document], valid_fraction: float, seed: int = 1234, text_of: Callable[[Document], str] = str
) -> tuple[list[Document], list[Document]]:
    """Parts documents into training and held-out ones, by document, the same way every time.

    Documents are visited in the order of a seeded hash of their text, and each that still fits into ``valid_fraction``
    of all bytes is held out; equal documents stay on one side. If none fits, the shortest is held out. A single
    document is cut: its last lines are held out.

    Where the fraction is too small for most documents, only short ones fit. One warning says so.

    Args:
        text_of: a document's text, where it is more than that.

    Returns:
        (training, held out), each in the given order; all of it is held in memory.

    Raises:
        ConfigError: for a fraction outside [0, 1), a text too short to be cut, or a single document
            that is more than its text.
    """
    if not 0.0 <= valid_fraction < 1.0:
        raise ConfigError(f"the held-out fraction must be in [0, 1), got {valid_fraction}")
    documents = list(documents)
    if valid_fraction == 0.0 or not documents:
        return documents, []
    sizes: Counter[str] = Counter()
    for document in documents:
        sizes[text_of(document)] += len(text_of(document).encode())
    if len(sizes) == 1:
        [only] = sizes
        if not isinstance(documents[0], str):
            raise ConfigError("the only document is a conversation, which is not cut; add more, or hold out nothing")
        return _cut(only, valid_fraction)  # type: ignore[return-value]
    budget = valid_fraction * sizes.total()
    held_out: set[str] = set()
    for text in sorted(sizes, key=lambda text: hashlib.blake2b(f"{seed} {text}".encode()).digest()):
        if sizes[text] <= budget:
            budget -= sizes[text]
            held_out.add(text)
    if not held_out:
        held_out.add(min(sizes, key=lambda text: (sizes[text], text)))
    train: list[Document] = []
    valid: list[Document] = []
    for document in documents:
        (valid if text_of(document) in held_out else train).append(document)
    held_out_bytes = sum(sizes[text] for text in held_out)
    means = held_out_bytes / len(valid), (sizes.total() - held_out_bytes) / len(train)
    if means[0] < _REPRESENTATIVE * means[1]:
        logger.warning(
            "warning: what is held out is not like the rest: %d short document(s), %.0f bytes in the mean; the %d others have "
            "%.0f, and a fraction of %g has no room for them. Hold out a larger one, or cut long documents into several (the "
            "lines of a .jsonl file)",
            *(len(valid), means[0], len(train), means[1], valid_fraction),
        )
    return train, valid


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
