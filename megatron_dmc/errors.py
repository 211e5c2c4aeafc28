"""The base class of every error that a user can mend."""

import re

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


def or_aim_below(ratio: float, words: str = ", or aim below") -> str:
    """The end of a remedy: a compression ratio that can be reached; empty where none can."""
    return f"{words} {ratio:.4g}" if ratio > 1 else ""
