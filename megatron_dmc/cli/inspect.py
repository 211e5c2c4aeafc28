"""``megatron-dmc inspect``."""

import argparse
from pathlib import Path

from megatron_dmc.cli.common import add_checkpoint, check_checkpoint, path
from megatron_dmc.config import MOST, ConfigError, Range
from megatron_dmc.files import why_no_file

HELP = "compression ratio of every layer and head on a text; of a folder of checkpoints, a list"


def add_arguments(parser: argparse.ArgumentParser) -> None:
    add_checkpoint(parser)
    parser.add_argument("--text", type=path, help="a text file; by default Python's own sources")
    parser.add_argument("--tokens", type=int, help="tokens to read (default: 2048, or the model's positions if fewer)")
    parser.add_argument("--json", action="store_true", help="print JSON instead of a table")


def run(options: argparse.Namespace) -> None:
    """Shows what a checkpoint's decisions do to a text: the ratio of every layer and head, and the bytes saved. For a
    folder of checkpoints (a recipe's checkpoint.directory) it lists them: the target and the ratio that each was saved at. One
    that is damaged is marked there, and the exit status is 1."""
    if options.tokens is not None:
        Range(2, MOST).check("--tokens", options.tokens)
    text = options.text and Path(options.text)
    if text and not text.is_dir() and (problem := why_no_file(text)) is not None:
        raise ConfigError(f"--text {text} {problem}; name a folder, a text file or a .jsonl file")
    check_checkpoint(options.checkpoint, or_several=True)
    from megatron_dmc.distributed.world import single_process
    from megatron_dmc.evaluation import inspect

    with single_process():
        inspect.run(options.checkpoint, options.text, options.tokens, as_json=options.json, base=options.base)
