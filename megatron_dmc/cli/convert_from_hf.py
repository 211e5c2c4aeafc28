"""``megatron-dmc convert-from-hf``."""

import argparse
import warnings

from megatron_dmc.cli.common import path

HELP = "a Hugging Face Llama to a checkpoint"


def add_arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("hf_folder", type=path, metavar="HF_FOLDER")
    parser.add_argument("output_folder", type=path, metavar="OUTPUT_FOLDER", help="must not exist, or be empty")
    parser.add_argument(
        "--pad-vocab-to-multiple-of",
        type=int,
        default=1,
        metavar="N",
        help="add tokens (rows with the mean of the others, which are never the likeliest) until the vocabulary is "
        "divisible by N, such as the tensor-parallel size; they stay: set the recipe's model.vocab_size to the new size, "
        "which an export's config.json has as well",
    )


def run(options: argparse.Namespace) -> None:
    """Converts a Hugging Face Llama (config.json, safetensors, tokenizer) to a Megatron checkpoint."""
    warnings.simplefilter("ignore")
    from megatron_dmc.convert.from_hf import import_hf

    import_hf(options.hf_folder, options.output_folder, pad_vocab_to_multiple_of=options.pad_vocab_to_multiple_of)
    print(f"{options.output_folder}: converted from {options.hf_folder}")
