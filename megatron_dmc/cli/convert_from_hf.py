"""``megatron-dmc convert-from-hf``."""

import argparse
import warnings

HELP = "a Hugging Face Llama to a checkpoint"


def add_arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("hf_folder", metavar="HF_FOLDER")
    parser.add_argument("output_folder", metavar="OUTPUT_FOLDER", help="must not exist, or be empty")


def run(options: argparse.Namespace) -> None:
    """Converts a Hugging Face Llama (config.json, safetensors, tokenizer) to a Megatron checkpoint."""
    warnings.simplefilter("ignore")
    from megatron_dmc.convert.from_hf import import_hf

    try:
        import_hf(options.hf_folder, options.output_folder)
    except KeyboardInterrupt:
        raise KeyboardInterrupt("nothing was written") from None
    print(f"{options.output_folder}: converted from {options.hf_folder}")
