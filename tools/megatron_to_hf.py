"""A checkpoint of this project to a Hugging Face folder: ``python tools/megatron_to_hf.py --help``."""

import argparse
import re
import signal
import sys
import warnings
from collections.abc import Sequence

_UNITS = {"": 1, "KB": 10**3, "MB": 10**6, "GB": 10**9}


def size(text: str) -> int:
    """Bytes of ``5GB``, ``300MB``, ``20KB`` or ``123``."""
    match = re.fullmatch(r"(\d+)\s*(|KB|MB|GB)", text.strip().upper())
    if match is None or int(match[1]) == 0:
        raise argparse.ArgumentTypeError(f"a size reads 5GB, 300MB or a number of bytes, got {text!r}")
    return int(match[1]) * _UNITS[match[2]]


def parse_arguments(arguments: Sequence[str] | None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(
        description="Convert a Megatron checkpoint to a folder that transformers loads: a base, a retrofit, or an adapter, "
        "merged with its base or (--adapter) by itself.",
        epilog="A retrofit loads with AutoModelForCausalLM.from_pretrained(OUTPUT_FOLDER, trust_remote_code=True); an "
        "adapter by itself with the Llama it was trained on: from_pretrained(OUTPUT_FOLDER, base=HF_FOLDER, "
        "trust_remote_code=True).",
    )
    parser.add_argument("checkpoint", metavar="CHECKPOINT", help="one checkpoint, such as DIRECTORY/final")
    parser.add_argument("output_folder", metavar="OUTPUT_FOLDER", help="must not exist, or be empty")
    adapter = parser.add_mutually_exclusive_group()
    adapter.add_argument(
        "--base", metavar="FOLDER", help="where an adapter's base checkpoint is now, if it has been moved"
    )
    adapter.add_argument(
        "--adapter",
        action="store_true",
        help="write what an adapter has learned alone (adapter.safetensors, megabytes), without its base",
    )
    parser.add_argument("--dtype", choices=["bfloat16", "float32"], help="of the weights (default: the checkpoint's)")
    parser.add_argument(
        "--max-shard-size",
        type=size,
        default="5GB",
        metavar="SIZE",
        help="of one safetensors file, such as 5GB or 300MB (default: %(default)s)",
    )
    return parser.parse_args(arguments)


def main(arguments: Sequence[str] | None = None) -> int:
    """Runs the command; returns its exit status: 0, or 1 or 130 (interrupted) after one line on standard error."""
    options = parse_arguments(arguments)
    # megatron-core warns of every optional package that is not there, when it is imported.
    warnings.simplefilter("ignore")
    import torch

    from megatron_dmc.checkpoint import CheckpointError
    from megatron_dmc.config import ConfigError
    from megatron_dmc.convert.to_hf import export_adapter, export_hf

    dtype = None if options.dtype is None else getattr(torch, options.dtype)
    try:
        if options.adapter:
            export_adapter(options.checkpoint, options.output_folder, dtype=dtype)
        else:
            export_hf(
                options.checkpoint,
                options.output_folder,
                dtype=dtype,
                max_shard_size=options.max_shard_size,
                base=options.base,
            )
    except (ConfigError, CheckpointError, OSError) as error:
        print(f"megatron_to_hf: {error}", file=sys.stderr)
        return 1
    except KeyboardInterrupt:
        print("megatron_to_hf: interrupted, nothing was written", file=sys.stderr)
        return 130
    print(f"{options.output_folder}: converted from {options.checkpoint}")
    return 0


if __name__ == "__main__":
    # A scheduler's SIGTERM also leaves nothing half written behind.
    signal.signal(signal.SIGTERM, signal.default_int_handler)
    sys.exit(main())
