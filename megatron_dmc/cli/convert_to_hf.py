"""``megatron-dmc convert-to-hf``."""

import argparse
import re
import warnings

from megatron_dmc.cli.common import add_base, path

HELP = "a checkpoint to a folder that transformers loads"

_UNITS = {"": 1, "KB": 10**3, "MB": 10**6, "GB": 10**9}


def size(text: str) -> int:
    """Bytes of ``5GB``, ``300MB``, ``20KB`` or ``123``."""
    match = re.fullmatch(r"(\d+)\s*(|KB|MB|GB)", text.strip().upper())
    if match is None or int(match[1]) == 0:
        raise argparse.ArgumentTypeError(f"a size reads 5GB, 300MB or a number of bytes, got {text!r}")
    return int(match[1]) * _UNITS[match[2]]


def add_arguments(parser: argparse.ArgumentParser) -> None:
    parser.epilog = (
        "A retrofit loads with AutoModelForCausalLM.from_pretrained(OUTPUT_FOLDER, trust_remote_code=True); an adapter by "
        "itself with the model it was trained on: from_pretrained(OUTPUT_FOLDER, base=HF_FOLDER, trust_remote_code=True)."
    )
    parser.add_argument("checkpoint", type=path, metavar="CHECKPOINT", help="one checkpoint, such as DIRECTORY/final")
    parser.add_argument("output_folder", type=path, metavar="OUTPUT_FOLDER", help="must not exist, or be empty")
    adapter = parser.add_mutually_exclusive_group()
    add_base(adapter)
    adapter.add_argument(
        "--adapter",
        action="store_true",
        help="write only what an adapter has learned (adapter.safetensors, megabytes), without its base",
    )
    parser.add_argument("--dtype", choices=["bfloat16", "float32"], help="of the weights (default: the checkpoint's)")
    parser.add_argument(
        "--max-shard-size",
        type=size,
        default="5GB",
        metavar="SIZE",
        help="of one safetensors file, such as 5GB or 300MB (default: %(default)s)",
    )


def run(options: argparse.Namespace) -> None:
    """Converts a Megatron checkpoint to a folder that transformers loads: a base, a retrofit, or an adapter, merged with its
    base or (--adapter) by itself."""
    warnings.simplefilter("ignore")
    import torch

    from megatron_dmc.convert.to_hf import export_adapter, export_hf

    source, output = options.checkpoint, options.output_folder
    dtype = None if options.dtype is None else getattr(torch, options.dtype)
    if options.adapter:
        written = export_adapter(source, output, dtype=dtype)
    else:
        written = export_hf(source, output, dtype=dtype, max_shard_size=options.max_shard_size, base=options.base)
    print(f"{output}: converted from {source}; {written}")
