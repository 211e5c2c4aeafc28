"""``megatron-dmc cluster-check``, also ``python -m megatron_dmc.cluster_check``."""

import argparse
from pathlib import Path

from megatron_dmc.cli.common import output_folder
from megatron_dmc.cluster_check.case import CASES, FP8
from megatron_dmc.cluster_check.layouts import CPU_PROCESSES, MOST_GPUS, all_layouts

HELP = "every parallel layout against one process, on the machine at hand"
HEADING = "## Every layout computes the same"


def add_arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument(
        "--folder",
        type=output_folder,
        default=Path("runs/cluster_check"),
        help="where runs and results go (default: %(default)s)",
    )
    # Layouts for machines of every size: only torch knows how large this one is.
    layouts = [layout.name for most in (CPU_PROCESSES, MOST_GPUS) for layout in all_layouts(most)]
    cases = [case.name for case in (*CASES, FP8)]
    for option, known in (("--layouts", list(dict.fromkeys(layouts))), ("--cases", cases)):
        names = f"default: all ({'; '.join(known)})"
        parser.add_argument(option, nargs="+", metavar="NAME", choices=known, help=names)
    parser.add_argument("--document", type=_page, help="write the table into this page, such as docs/layouts.md")


def run(options: argparse.Namespace) -> int:
    """Runs every layout that fits here, prints a table, and fails if one computes something else."""
    from megatron_dmc.cluster_check.check import check

    return 0 if check(options.folder, options.layouts, options.cases, options.document, HEADING) else 1


def _page(text: str) -> Path:
    page = Path(text)
    if not (page.is_file() and HEADING in page.read_text(encoding="utf-8", errors="replace").splitlines()):
        raise argparse.ArgumentTypeError(f"{text} is no page with a line {HEADING!r}")
    return page
