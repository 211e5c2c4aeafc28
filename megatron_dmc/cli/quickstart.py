"""``megatron-dmc quickstart``."""

import argparse
from pathlib import Path

from megatron_dmc.cli.common import output_folder, path

HELP = "the whole job on a small model: pretrain, retrofit, compare, export, generate"


def add_arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument(
        "--data", type=path, help="a folder, .txt or .jsonl; by default the sources of Python's standard library"
    )
    parser.add_argument("--smoke", action="store_true", help="everything at toy size")
    parser.add_argument(
        "--output",
        type=output_folder,
        help="the run's folder (default: runs/quickstart, with --smoke runs/quickstart-smoke)",
    )


def run(options: argparse.Namespace) -> None:
    """Pretrains a small Llama on real text, retrofits it in three ways, compares, exports and generates. What is done is not
    done again."""
    from megatron_dmc.experiments.quickstart.run import run_quickstart

    folder = options.output or Path("runs", "quickstart-smoke" if options.smoke else "quickstart")
    run_quickstart(folder, options.data, options.smoke)
