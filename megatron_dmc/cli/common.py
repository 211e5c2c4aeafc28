"""Arguments that several commands take."""

import argparse
import os


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
    return text


def add_recipe(parser: argparse.ArgumentParser) -> None:
    """``recipe`` and ``overrides``."""
    parser.add_argument("recipe", help="a YAML recipe, see examples/")
    parser.add_argument("overrides", nargs="*", metavar="section.field=value", help="settings over the recipe's")


def add_checkpoint(parser: argparse.ArgumentParser) -> None:
    """``checkpoint`` and ``base``."""
    parser.add_argument("checkpoint", type=path, help="a checkpoint folder")
    add_base(parser)


def add_base(parser: argparse._ActionsContainer) -> None:
    parser.add_argument(
        "--base", type=path, metavar="FOLDER", help="where an adapter's base checkpoint is now, if it has been moved"
    )
