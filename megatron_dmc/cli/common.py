"""Arguments that several commands take."""

import argparse


def add_recipe(parser: argparse.ArgumentParser) -> None:
    """``recipe`` and ``overrides``."""
    parser.add_argument("recipe", help="a YAML recipe, see examples/")
    parser.add_argument("overrides", nargs="*", metavar="section.field=value", help="settings over the recipe's")


def add_checkpoint(parser: argparse.ArgumentParser) -> None:
    """``checkpoint`` and ``base``."""
    parser.add_argument("checkpoint", help="a checkpoint folder")
    add_base(parser)


def add_base(parser: argparse._ActionsContainer) -> None:
    parser.add_argument(
        "--base", metavar="FOLDER", help="where an adapter's base checkpoint is now, if it has been moved"
    )
