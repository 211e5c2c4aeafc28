"""``megatron-dmc convert-from-hf``."""

import argparse
import os
import re
import warnings

from megatron_dmc.cli.common import path

HELP = "a Hugging Face model, or a GGUF file, to a checkpoint"


def multiple(text: str) -> int:
    """A number that a vocabulary may be padded to a multiple of."""
    from megatron_dmc.recipe.base import MOST_ADDED_TOKENS

    number = int(text) if re.fullmatch(r"\d{1,9}", text, re.ASCII) else 0
    if not 1 <= number <= MOST_ADDED_TOKENS:
        raise argparse.ArgumentTypeError(
            f"must be a whole number from 1 to {MOST_ADDED_TOKENS}, such as the tensor-parallel size, got {text[:40]!r}"
        )
    return number


def add_arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument(
        "source",
        type=path,
        metavar="HF_FOLDER|FILE.gguf",
        help="a GGUF file's quantized weights are unpacked to float32",
    )
    parser.add_argument("output_folder", type=path, metavar="OUTPUT_FOLDER", help="must not exist, or be empty")
    add_padding(parser)


def add_padding(parser: argparse.ArgumentParser) -> None:
    """``--pad-vocab-to-multiple-of``, of every conversion to a checkpoint."""
    parser.add_argument(
        "--pad-vocab-to-multiple-of",
        type=multiple,
        default=1,
        metavar="N",
        help="add rows to the vocabulary (the mean of the others, which is never the likeliest) until N, such as the "
        "tensor-parallel size, divides it; a recipe's model.vocab_size, if it is given, counts them; an export leaves them "
        "out",
    )


def run(options: argparse.Namespace) -> None:
    """Converts a Hugging Face model (config.json, safetensors, tokenizer) of one of these families to a Megatron checkpoint:
    Llama, Mistral, Qwen2, Qwen3; or the GGUF file of a Llama."""
    warnings.simplefilter("ignore")
    from megatron_dmc.convert.from_hf import import_hf
    from megatron_dmc.convert.gguf import SUFFIX, import_gguf

    source, output = options.source, options.output_folder
    convert = import_gguf if source.lower().endswith(SUFFIX) and not os.path.isdir(source) else import_hf
    written = convert(source, output, pad_vocab_to_multiple_of=options.pad_vocab_to_multiple_of)
    print(f"{output}: converted from {source}; {written}")
