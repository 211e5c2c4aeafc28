"""Text from files, made harmless: for HTML, for a script's data, and for plotly, which reads HTML in its labels."""

import html
import json
import unicodedata
from typing import Any

# Marks a file as a page of this command, which may be replaced.
MARK = '<meta name="generator" content="megatron-dmc report">'
# Of a name, a command or a fact.
MOST_CHARACTERS = 500
# Of a name in a legend, of an axis' title.
MOST_OF_A_LABEL = 60


def plain(text: str, most: int = MOST_CHARACTERS) -> str:
    """Without control characters, halves of surrogate pairs and what turns the direction of writing; not too long."""
    harmless = "".join(_REPLACED if _is_harmful(character) else character for character in text[: most + 1])
    return harmless if len(harmless) <= most else f"{harmless[:most]}…"


def escaped(text: str, most: int = MOST_CHARACTERS) -> str:
    """For HTML, attributes included."""
    return html.escape(plain(text, most))


def label(text: str) -> str:
    """For plotly, whose labels are HTML of its own: it knows these three signs' names, and not a quotation mark's."""
    return html.escape(plain(text, MOST_OF_A_LABEL), quote=False)


def data(values: Any) -> str:
    """JSON that nothing inside can end a script with."""
    made = json.dumps(values, allow_nan=False, separators=(",", ":"))
    return made.replace("<", "\\u003c").replace(">", "\\u003e").replace("&", "\\u0026")


_REPLACED = "\ufffd"
_TURNS = set("\u061c\u200e\u200f\u202a\u202b\u202c\u202d\u202e\u2066\u2067\u2068\u2069")


def _is_harmful(character: str) -> bool:
    return character in _TURNS or unicodedata.category(character) in ("Cc", "Cs", "Zl", "Zp")
