"""Arguments that several commands take."""

import argparse
from pathlib import Path

from megatron_dmc.config import ConfigError


def add_recipe(parser: argparse.ArgumentParser) -> None:
    """``recipe`` and ``overrides``."""
    parser.add_argument("recipe", help="a YAML recipe, see examples/")
    parser.add_argument("overrides", nargs="*", metavar="section.field=value", help="settings over the recipe's")


def add_checkpoint(parser: argparse.ArgumentParser) -> None:
    """``checkpoint`` and ``base``."""
    parser.add_argument("checkpoint", help="a checkpoint folder")
    add_base(parser)


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
