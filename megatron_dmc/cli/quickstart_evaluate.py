"""``megatron-dmc quickstart-evaluate``: a stage of the quickstart."""

import argparse

HELP = ""


def add_arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("--smoke", action="store_true", help="a few held-out windows only")


def run(options: argparse.Namespace) -> None:
    """In the quickstart's folder: measures all its models on the same held-out text and writes summary.json."""
    from megatron_dmc.distributed.world import single_process
    from megatron_dmc.experiments.quickstart.evaluate import write_summary

    with single_process():
        write_summary(options.smoke)
