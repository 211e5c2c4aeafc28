"""``megatron-dmc recipes``."""

import argparse
from pathlib import Path

from megatron_dmc.cli.common import model_name, output_folder, path
from megatron_dmc.config import ConfigError

HELP = "ways to the same ratio side by side, on a small model or on a real one"


def add_arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument(
        "--smoke", action="store_true", help="three rows at toy size, with --model one; no page is written"
    )
    parser.add_argument(
        "--output",
        type=output_folder,
        help="the run's folder (default: runs/recipes, with --model runs/recipes-NAME; with --smoke NAME-smoke)",
    )
    parser.add_argument(
        "--model",
        type=path,
        metavar="smollm2|HF_FOLDER|FILE.gguf",
        help="operations and windows on this model, by what it recalls",
    )
    parser.add_argument(
        "--data", type=path, help="with --model: a folder, .txt or .jsonl, as megatron-dmc quickstart takes it"
    )


def run(options: argparse.Namespace) -> None:
    """Trains a small model to the same compression ratios in many ways and compares the losses. Takes about two hours on two
    cores; what is done is not done again. In a source checkout it writes examples/recipes/results.json and the tables of
    docs/small_model.md; elsewhere the table is printed. With --model it retrofits a pretrained model instead, by the recipes
    of examples/smollm2 with other operations and windows: about eight hours for three seeds of smollm2 on two cores."""
    name = "recipes" if options.model is None else f"recipes-{model_name(options.model)}"
    folder = options.output or Path("runs", f"{name}-smoke" if options.smoke else name)
    if options.model is not None:
        from megatron_dmc.experiments.recipes.real_model import compare_on_real_model

        compare_on_real_model(folder, options.model, options.data, options.smoke)
        return
    if options.data is not None:
        raise ConfigError("--data goes with --model; add --model smollm2, or leave it out")
    from megatron_dmc.experiments.recipes.run import run_recipes

    run_recipes(folder, options.smoke)
