"""``megatron-dmc ratios``."""

import argparse

from megatron_dmc.cli.common import path
from megatron_dmc.config import Range

HELP = "which compression ratios an export can be used at, by another merge threshold"

_MOST_TOKENS, _MOST_TEXTS, _MOST_RATIO = 2**20, 1000, 10_000


def add_arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("folder", type=path, metavar="EXPORT", help="a folder of convert-to-hf, of a model that merges")
    parser.add_argument(
        "--text", type=path, required=True, metavar="PREFIX", help="a held-out dataset of megatron-dmc preprocess"
    )
    parser.add_argument(
        "--tokens",
        type=int,
        default=2048,
        metavar="N",
        help="of each text; shorter ones have a smaller ratio (default: %(default)s)",
    )
    parser.add_argument("--texts", type=int, default=8, metavar="N", help="read for each point (default: %(default)s)")
    parser.add_argument(
        "--most", type=float, metavar="RATIO", help="where to end (default: twice the ratio it was trained for)"
    )


def run(options: argparse.Namespace) -> None:
    """Measures which merge threshold gives an export which compression ratio, and writes the curve into its config.json. A
    token merges where its decision logit is above the threshold, so that one trained model serves a range of ratios: evaluate
    takes --compression-ratio then, generate() of transformers merge_threshold=model.config.threshold_of(6), and vLLM a
    request's extra argument compression_ratio."""
    Range(16, _MOST_TOKENS).check("--tokens", options.tokens)
    Range(1, _MOST_TEXTS).check("--texts", options.texts)
    if options.most is not None:
        Range(1, _MOST_RATIO).check("--most", options.most)
    from megatron_dmc.evaluation.exported.ratios import measure_ratios

    curve = measure_ratios(options.folder, options.text, tokens=options.tokens, texts=options.texts, most=options.most)
    for ratio, threshold in zip(curve.ratios, curve.thresholds, strict=True):
        print(f"CR {ratio:6.2f} above {threshold:+.4f}")
    print(
        f"{options.folder}: measured CR {curve.ratios[0]:.2f} to {curve.ratios[-1]:.2f} in texts of {curve.tokens} tokens"
    )
