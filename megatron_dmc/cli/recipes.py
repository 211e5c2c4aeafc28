"""``megatron-dmc recipes``."""

import argparse
from pathlib import Path

from megatron_dmc.cli.common import output_folder

HELP = "ways to the same ratio side by side, on a small model"


def add_arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("--smoke", action="store_true", help="three rows at toy size; no page is written")
    parser.add_argument(
        "--output", type=output_folder, help="the run's folder (default: runs/recipes, with --smoke runs/recipes-smoke)"
    )


def run(options: argparse.Namespace) -> None:
    """Trains a small model to the same compression ratios in many ways and compares the losses. Takes about two hours on two
    cores; what is done is not done again. In a source checkout it writes examples/recipes/results.json and the section of
    docs/choosing.md; elsewhere the table is printed."""
    from megatron_dmc.experiments.recipes.run import run_recipes

    run_recipes(options.output or Path("runs", "recipes-smoke" if options.smoke else "recipes"), options.smoke)
