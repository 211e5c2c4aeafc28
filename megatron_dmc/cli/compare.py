"""``megatron-dmc compare``."""

import argparse
import math
from pathlib import Path

from megatron_dmc.cli.common import model_name, output_folder, path, whole_number
from megatron_dmc.config import ConfigError
from megatron_dmc.experiments.compare.rows import METHODS

HELP = "DMC beside what could be taken instead, on one model and one text: quality, bytes and speed at equal ratios"

_MOST_SEEDS, _MOST_RATIO, _MOST_TEXTS = 100, 1000, 500


def add_arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument(
        "recipe",
        nargs="?",
        type=path,
        help="a retrofit's recipe, with its base and its datasets; by default one of examples/compare",
    )
    parser.add_argument(
        "--model",
        type=path,
        metavar="smollm2|HF_FOLDER|FILE.gguf",
        help="compare on this model, in place of the quickstart's small one",
    )
    parser.add_argument("--data", type=path, help="a folder, .txt or .jsonl, as megatron-dmc quickstart takes it")
    parser.add_argument(
        "--methods",
        type=_methods,
        metavar="A,B",
        help=f"only these of {', '.join(METHODS)} (default: all)",
    )
    parser.add_argument(
        "--ratios",
        type=_ratios,
        metavar="R,R",
        help="compression ratios (default: 2,4,6,8; with a model or a recipe 4,8)",
    )
    parser.add_argument("--seeds", type=_seeds, default=3, metavar="N", help="of each training (default: %(default)s)")
    parser.add_argument(
        "--ruler",
        type=_texts,
        default=0,
        metavar="N",
        help="also so many texts of each task of dmc_ruler, of 1024 and 2048 tokens; slow on a CPU",
    )
    parser.add_argument("--smoke", action="store_true", help="toy size: two ratios, one seed, few steps")
    parser.add_argument(
        "--output",
        type=output_folder,
        help="the run's folder (default: runs/compare, with a model or a recipe runs/compare-NAME; with --smoke NAME-smoke)",
    )


def run(options: argparse.Namespace) -> None:
    """Measures DMC beside grouped-query uptraining, DMS and methods that need no training: on one base and one text, with
    equally many tokens for everything that trains. Loss, KL, recall, bytes that the cache really holds, and speed, at each
    ratio; what is trained, with several seeds. It takes hours on two cores. What is done is not done again: run it again
    to go on."""
    if options.recipe is not None and (options.model is not None or options.data is not None or options.smoke):
        raise ConfigError("RECIPE has its own model and data; leave --model, --data and --smoke out, or the recipe")
    from megatron_dmc.experiments.compare.run import Request, compare

    chosen = options.recipe or options.model
    name = "compare" if chosen is None else f"compare-{model_name(chosen)}"
    folder = options.output or Path("runs", f"{name}-smoke" if options.smoke else name)
    compare(
        folder,
        Request(
            options.recipe,
            options.model,
            options.data,
            options.methods,
            options.ratios,
            options.seeds,
            options.ruler,
            options.smoke,
        ),
    )


def _methods(text: str) -> tuple[str, ...]:
    names = tuple(dict.fromkeys(text.split(",")))
    for name in names:
        if name not in METHODS:
            raise argparse.ArgumentTypeError(f"there is no method {name[:40]!r}; name some of {', '.join(METHODS)}")
    return names


def _ratios(text: str) -> tuple[float, ...]:
    try:
        found = tuple(sorted({float(each) for each in text.split(",")}))
    except ValueError:
        found = ()
    if not found or not all(1 < ratio <= _MOST_RATIO and math.isfinite(ratio) for ratio in found):
        raise argparse.ArgumentTypeError(
            f"must be numbers above 1 and at most {_MOST_RATIO}, such as 4,8; got {text[:40]!r}"
        )
    return found


def _seeds(text: str) -> int:
    return whole_number(text, 1, _MOST_SEEDS)


def _texts(text: str) -> int:
    return whole_number(text, 0, _MOST_TEXTS)
