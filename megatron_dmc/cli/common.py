"""Arguments that several commands take."""

import argparse
import os
from pathlib import Path
from typing import NoReturn

from megatron_dmc.config import LONGEST_NAME, LONGEST_PATH, ConfigError
from megatron_dmc.errors import shortened


class Parser(argparse.ArgumentParser):
    """Says what it refuses in one line, as every error is said."""

    def error(self, message: str) -> NoReturn:
        self.exit(2, f"{self.prog}: {shortened(message)}; see {self.prog} --help\n")


def add_recipe(parser: argparse.ArgumentParser) -> None:
    """``recipe`` and ``overrides``."""
    parser.add_argument("recipe", help="a YAML recipe, see examples/")
    parser.add_argument("overrides", nargs="*", metavar="section.field=value", help="settings over the recipe's")


def add_checkpoint(parser: argparse.ArgumentParser) -> None:
    """``checkpoint`` and ``base``."""
    parser.add_argument("checkpoint", help="a checkpoint folder")
    add_base(parser)


def output_folder(text: str) -> Path:
    """The type of a flag that names a folder to write to; refuses, before any work, what can be none."""
    path = Path(text)
    if not text.strip():
        raise argparse.ArgumentTypeError("it is empty; name a folder")
    if any(len(os.fsencode(part)) > LONGEST_NAME for part in path.parts) or len(os.fsencode(path)) > LONGEST_PATH:
        raise argparse.ArgumentTypeError(f"{text[:30]}... is too long for the name of a folder")
    there = next(place for place in (path, *path.parents) if place.exists())
    if not there.is_dir():
        raise argparse.ArgumentTypeError(f"{there} is a file; name a folder")
    if not os.access(there, os.W_OK | os.X_OK):
        raise argparse.ArgumentTypeError(f"{there} cannot be written to; name another folder")
    return path


def check_checkpoint(folder: str) -> None:
    """Raises ConfigError for a path that cannot be a checkpoint's, with what it is; before torch is imported."""
    path = Path(folder)
    if path.exists() and not path.is_dir():
        raise ConfigError(f"{path} is a file, not a checkpoint's folder; name one checkpoint, such as DIRECTORY/final")
    if (path / "checkpoints").is_dir() and not (path / "dmc.json").exists():
        raise ConfigError(f"{path} is a run's folder; name {path / 'checkpoints'}, or one checkpoint in it")


def add_base(parser: argparse._ActionsContainer) -> None:
    parser.add_argument(
        "--base", metavar="FOLDER", help="where an adapter's base checkpoint is now, if it has been moved"
    )
