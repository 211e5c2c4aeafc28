"""``megatron-dmc generate``."""

import argparse
import math

from megatron_dmc.cli.common import add_checkpoint, check_checkpoint, logit
from megatron_dmc.config import ConfigError, Range

HELP = "continue a text with a retrofit's checkpoint"


def add_arguments(parser: argparse.ArgumentParser) -> None:
    add_checkpoint(parser)
    parser.add_argument("--prompt", required=True)
    parser.add_argument("--max-new-tokens", type=int, default=64, help="(default: %(default)s)")
    parser.add_argument("--temperature", type=float, default=0.0, help="0 (default) is greedy")
    parser.add_argument(
        "--merge-threshold",
        type=logit,
        default=0.0,
        metavar="T",
        help="logits: a token merges where its decision logit is above it (default: 0, as it was trained)",
    )
    parser.add_argument("--seed", type=int, default=0, help="of the sampling (default: %(default)s)")


def run(options: argparse.Namespace) -> None:
    """Continues a prompt with the compressed cache and prints the text."""
    _check(options)
    from megatron_dmc.distributed.world import single_process
    from megatron_dmc.inference import generate

    with single_process():
        generate.run(
            options.checkpoint,
            options.prompt,
            options.max_new_tokens,
            options.temperature,
            options.seed,
            base=options.base,
            merge_threshold=options.merge_threshold,
        )


def _check(options: argparse.Namespace) -> None:
    # The model's positions are the upper end.
    Range(1, math.inf).check("--max-new-tokens", options.max_new_tokens)
    if options.temperature != 0:
        Range(1e-3, 1000).check("--temperature (other than 0, which is greedy)", options.temperature)
    Range(0, 2**63 - 1).check("--seed", options.seed)
    try:
        options.prompt.encode()
    except UnicodeEncodeError:
        raise ConfigError("--prompt is not UTF-8 text") from None
    check_checkpoint(options.checkpoint)
