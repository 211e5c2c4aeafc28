"""``megatron-dmc group-heads``."""

import argparse
import warnings

from megatron_dmc.cli.common import path

HELP = "a Hugging Face model with fewer KV heads, to train on: what a retrofit is compared with"


def add_arguments(parser: argparse.ArgumentParser) -> None:
    parser.epilog = (
        "The model has to be trained before it is any good: convert-from-hf, retrofit with a recipe of pretrain phases, "
        "convert-to-hf; then evaluate it beside the base. See docs/evaluation.md."
    )
    parser.add_argument("folder", type=path, metavar="HF_BASE", help="a plain model's Hugging Face folder")
    parser.add_argument("output_folder", type=path, metavar="OUTPUT", help="must not exist, or be empty")
    parser.add_argument(
        "--kv-heads",
        type=int,
        required=True,
        metavar="N",
        help="of the new model; divides the present number, which by N is the compression ratio of the cache",
    )


def run(options: argparse.Namespace) -> None:
    """Writes a plain Hugging Face model anew in which neighbouring KV heads have become their mean (grouped-query attention,
    arXiv 2305.13245). All else stays as it is."""
    warnings.simplefilter("ignore")
    from megatron_dmc.baselines.gqa import group_heads

    written = group_heads(options.folder, options.output_folder, options.kv_heads)
    print(f"{options.output_folder}: grouped from {options.folder}; {written}")
