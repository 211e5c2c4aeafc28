"""A Hugging Face Llama folder to a checkpoint of this project: ``python tools/hf_to_megatron.py --help``."""

import argparse
import signal
import sys
import warnings
from collections.abc import Sequence


def parse_arguments(arguments: Sequence[str] | None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(
        description="Convert a Hugging Face Llama (config.json, safetensors, tokenizer) to a Megatron checkpoint."
    )
    parser.add_argument("hf_folder", metavar="HF_FOLDER")
    parser.add_argument("output_folder", metavar="OUTPUT_FOLDER", help="must not exist, or be empty")
    parser.add_argument(
        "--pad-vocab-to-multiple-of",
        type=int,
        default=1,
        metavar="N",
        help="add tokens (rows with the mean of the others, which are never the likeliest) until the vocabulary is "
        "divisible by N, such as the tensor-parallel size; they stay: set the recipe's model.vocab_size to the new size, "
        "which an export's config.json has as well",
    )
    return parser.parse_args(arguments)


def main(arguments: Sequence[str] | None = None) -> int:
    """Runs the command; returns its exit status: 0, or 1 or 130 (interrupted) after one line on standard error."""
    options = parse_arguments(arguments)
    # megatron-core warns of every optional package that is not there, when it is imported.
    warnings.simplefilter("ignore")
    from megatron_dmc.checkpoint import CheckpointError
    from megatron_dmc.config import ConfigError
    from megatron_dmc.convert.from_hf import import_hf

    try:
        import_hf(
            options.hf_folder,
            options.output_folder,
            pad_vocab_to_multiple_of=options.pad_vocab_to_multiple_of,
        )
    except (ConfigError, CheckpointError, OSError) as error:
        print(f"hf_to_megatron: {error}", file=sys.stderr)
        return 1
    except KeyboardInterrupt:
        print("hf_to_megatron: interrupted, nothing was written", file=sys.stderr)
        return 130
    print(f"{options.output_folder}: converted from {options.hf_folder}")
    return 0


if __name__ == "__main__":
    # A scheduler's SIGTERM also leaves nothing half written behind.
    signal.signal(signal.SIGTERM, signal.default_int_handler)
    sys.exit(main())
