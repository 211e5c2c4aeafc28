"""``megatron-dmc report``."""

import argparse
import os
from pathlib import Path

from megatron_dmc.cli.common import path

HELP = (
    "one HTML page about a run, with its figures: quality, ratios of every head, training, speed, a text token by token"
)


def add_arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument(
        "folder",
        type=path,
        metavar="RUN",
        help="the folder of a run of quickstart (with --model, too), of a comparison, or of retrofit; or one of checkpoints",
    )
    parser.add_argument(
        "--without-text",
        action="store_true",
        help="load no model: leave out what it does with each token of a text",
    )


def run(options: argparse.Namespace) -> None:
    """Writes report.html into a run's folder: one file that needs no network, with everything that the run has numbers for,
    and the same figures as PNGs in the folder report beside it. What was there of an earlier report is replaced. One of the
    run's exported models is loaded and reads 200 tokens; of a run that was not exported a checkpoint is, through a temporary
    export (TMPDIR says where)."""
    from megatron_dmc.report.write import check, write_report

    folder = Path(options.folder)
    check(folder)
    written = write_report(folder, with_text=not options.without_text)
    for line in written.left_out:
        print(line)
    print(
        f"report: {os.path.relpath(written.page)} ({written.images} PNGs in {os.path.relpath(written.page.parent)}/report)"
    )
