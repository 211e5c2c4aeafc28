"""The base class of every error that a user can mend."""

import re
from collections.abc import Sequence

# Longer than any number that a person writes or a path holds.
_MOST_DIGITS = 60


class DMCError(Exception):
    """Bad settings, bad files, or a run that cannot go on. The message is one line: what, where, and what to do.

    The command prints only the message, without a traceback (``megatron_dmc.cli``).
    """

    def __str__(self) -> str:
        return shortened(super().__str__())


class Terminated(KeyboardInterrupt):
    """A signal that asks this process alone to end, such as SIGTERM. Ctrl-C reaches the commands that it started as well."""


def is_too_long_number(error: BaseException) -> bool:
    """Whether Python refused a whole number of more than 4300 digits; its own words speak of its settings."""
    return "set_int_max_str_digits" in str(error)


def shortened(message: str) -> str:
    """A message in which a number of very many digits stands by its first ones."""
    return re.sub(rf"\d{{{_MOST_DIGITS + 1},}}", lambda found: f"{found[0][:10]}... ({len(found[0])} digits)", message)


def in_one_line(error: BaseException, most: int = 300) -> str:
    """What another library's error says, its lines joined, ``most`` characters of it; its kind where it says nothing."""
    return " ".join(str(error).split())[:most] or type(error).__name__


# Names that a message lists.
MOST_NAMES = 3


def first_names(names: Sequence[str]) -> str:
    """The first names of what may be very many."""
    return ", ".join(names[:MOST_NAMES]) + (", and more" if len(names) > MOST_NAMES else "")


def or_aim_below(ratio: float, words: str = ", or aim below") -> str:
    """The end of a remedy: a compression ratio that can be reached; empty where none can."""
    return f"{words} {ratio:.4g}" if ratio > 1 else ""
