"""``megatron-dmc convert-from-megatron``."""

import argparse
import warnings

from megatron_dmc.cli.common import path
from megatron_dmc.cli.convert_from_hf import add_padding

HELP = "a Megatron-LM checkpoint, such as the authors' release, to a checkpoint"


def add_arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument(
        "source",
        type=path,
        metavar="DIRECTORY",
        help="with mp_rank_00/model_optim_rng.pt, or with iter_* folders, of which the latest is taken",
    )
    parser.add_argument("output_folder", type=path, metavar="OUTPUT_FOLDER", help="must not exist, or be empty")
    parser.add_argument(
        "--tokenizer",
        type=path,
        metavar="HF_FOLDER",
        help="a Hugging Face folder of the same model, whose tokenizer is copied: Megatron-LM's checkpoints have none",
    )
    add_padding(parser)


def run(options: argparse.Namespace) -> None:
    """Converts a Megatron-LM checkpoint (format torch; tensor-parallel ranks are joined) to one of this project. Nothing that
    its pickles hold is run."""
    warnings.simplefilter("ignore")
    from megatron_dmc.convert.from_megatron import import_megatron

    source, output = options.source, options.output_folder
    multiple = options.pad_vocab_to_multiple_of
    written = import_megatron(source, output, tokenizer=options.tokenizer, pad_vocab_to_multiple_of=multiple)
    print(f"{output}: converted from {source}; {written}")
