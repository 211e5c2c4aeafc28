"""``megatron-dmc measure``: one row of the quickstart's and the recipes' tables."""

import argparse
import json

HELP = ""


def add_arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("checkpoint", help="below checkpoints/, such as recipe/final")
    parser.add_argument("--smoke", action="store_true", help="a few held-out windows only")


def run(options: argparse.Namespace) -> None:
    """In a run's folder: prints, as JSON, a checkpoint's loss on held-out text, its ratio, and the bytes its cache holds."""
    from megatron_dmc.distributed.world import single_process
    from megatron_dmc.experiments.measure import measure

    with single_process():
        print(json.dumps(measure(options.checkpoint, smoke=options.smoke)))
