"""Arguments that several commands take."""

import argparse
import os
from pathlib import Path
from typing import NoReturn

from megatron_dmc.config import ConfigError
from megatron_dmc.errors import shortened
from megatron_dmc.files import checkpoint_below, why_no_checkpoint, why_nothing_new
from megatron_dmc.hf.curve import MOST_THRESHOLD, check_threshold


class Parser(argparse.ArgumentParser):
    """Says what it refuses in one line, as every error is said."""

    def error(self, message: str) -> NoReturn:
        self.exit(2, f"{self.prog}: {shortened(message)}; see {self.prog} --help\n")


def path(text: str) -> str:
    """A path; an empty one, as a shell makes of a variable that is not set, would be the working folder."""
    if not text:
        raise argparse.ArgumentTypeError("an empty path; name a file or a folder (. is the working folder)")
    return text


def prefix(text: str) -> str:
    """A :func:`path` whose last part suffixes are added to."""
    if os.path.basename(path(text)) in ("", os.curdir, os.pardir):
        raise argparse.ArgumentTypeError(
            f"{text} names a folder; add a name for the files in it, such as {os.path.join(text, 'train')}"
        )
    if os.path.exists(text) and not os.path.isfile(text) and not os.path.isdir(text):
        raise argparse.ArgumentTypeError(f"{text} is a device or a pipe; name files that can be written beside others")
    return text


def logit(text: str) -> float:
    """A finite number that a decision logit may be."""
    try:
        return check_threshold("it", float(text))
    except ValueError:
        raise argparse.ArgumentTypeError(
            f"must be a number from -{MOST_THRESHOLD:g} to {MOST_THRESHOLD:g}, got {text[:40]!r}"
        ) from None


def whole_number(text: str, least: int, most: int) -> int:
    """A number between these two."""
    # Not int() first: it refuses thousands of digits.
    if not (text.isascii() and text.isdigit() and least <= int(text[:12]) <= most):
        raise argparse.ArgumentTypeError(f"must be a whole number from {least} to {most}, got {text[:40]!r}")
    return int(text)


def add_recipe(parser: argparse.ArgumentParser) -> None:
    """``recipe`` and ``overrides``."""
    parser.add_argument("recipe", type=path, help="a YAML recipe, see examples/")
    parser.add_argument("overrides", nargs="*", metavar="section.field=value", help="settings over the recipe's")


def add_checkpoint(parser: argparse.ArgumentParser) -> None:
    """``checkpoint`` and ``base``."""
    parser.add_argument("checkpoint", type=path, help="a checkpoint folder")
    add_base(parser)


def output_folder(text: str) -> Path:
    """The type of a flag that names a folder to write to; refuses, before any work, what can be none."""
    folder = Path(path(text))
    if (problem := why_nothing_new(folder / "any")) is not None:
        raise argparse.ArgumentTypeError(f"{problem}; name another folder")
    return folder


def model_name(model: str) -> str:
    """What a run on the model ``--model`` names is called by default, whatever way its path is written."""
    # realpath, not Path.resolve: that raises for a link which leads to itself.
    return Path(os.path.realpath(model)).stem or "model"


def check_checkpoint(name: str, *, or_several: bool = False) -> None:
    """Raises ConfigError for a path that is no checkpoint's, with what it is; before torch is imported.

    Args:
        or_several: whether a folder of checkpoints will do.
    """
    folder = Path(name)
    problem = why_no_checkpoint(folder)
    if problem is not None and not (or_several and checkpoint_below(folder) is not None):
        raise ConfigError(problem)


def add_base(parser: argparse._ActionsContainer) -> None:
    parser.add_argument(
        "--base", type=path, metavar="FOLDER", help="where an adapter's base checkpoint is now, if it has been moved"
    )
