"""``make cluster-check``: runs every layout that fits here, prints a table, and fails if one computes something else."""

import argparse
import json
import sys
import warnings
from collections.abc import Sequence
from pathlib import Path

HEADING = "## Every layout computes the same"
CPU_PROCESSES, MOST_GPUS = 8, 16


def main(arguments: Sequence[str] | None = None) -> int:
    # megatron-core warns of every optional package that is not there, when it is imported.
    warnings.filterwarnings("ignore", module=r"megatron\.core")
    import torch

    from megatron_dmc.cluster_check.cases import cases_here, cases_not_here
    from megatron_dmc.cluster_check.launch import CheckError, clear_folder, run_layouts
    from megatron_dmc.cluster_check.layouts import REFERENCE, all_layouts
    from megatron_dmc.cluster_check.report import is_good, make_report, remarks, table, write_section

    available = min(torch.cuda.device_count(), MOST_GPUS) if torch.cuda.is_available() else CPU_PROCESSES
    # A layout of more than this machine has is named all the same.
    most = max(available, CPU_PROCESSES)
    known_layouts, known_cases = all_layouts(most), cases_here()
    parser = argparse.ArgumentParser(prog="cluster-check", description=__doc__)
    parser.add_argument("--folder", type=Path, default=Path("runs/cluster_check"), help="where runs and results go")
    for option, known in (("--layouts", known_layouts), ("--cases", known_cases)):
        names = [x.name for x in known]
        parser.add_argument(option, nargs="+", metavar="NAME", choices=names, help=f"default: all ({'; '.join(names)})")
    parser.add_argument("--document", type=Path, help="a page whose section is to be written anew")
    options = parser.parse_args(arguments)
    page = options.document
    if page is not None and not (page.is_file() and HEADING in page.read_text(encoding="utf-8").splitlines()):
        parser.error(f"--document {page} is no page with a line {HEADING!r}")
    layouts = [x for x in known_layouts if options.layouts is None or x.name in (REFERENCE, *options.layouts)]
    cases = [x for x in known_cases if options.cases is None or x.name in options.cases]
    left_out = {x.name: f"needs {x.processes} GPUs, here are {available}" for x in layouts if x.processes > available}
    fitting = [x for x in layouts if x.name not in left_out]
    try:
        clear_folder(options.folder)
        failures = run_layouts(options.folder, fitting, cases, most)
    except CheckError as error:
        print(f"cluster-check: {error}", file=sys.stderr)
        return 1
    report = make_report(options.folder, layouts, cases, failures, left_out, cases_not_here())
    (options.folder / "results.json").write_text(json.dumps(report, indent=1) + "\n")
    print("\n".join([report["machine"], "", *table(report), "", *remarks(report)]))
    if page is not None:
        write_section(report, page, HEADING)
    return 0 if is_good(report) else 1


if __name__ == "__main__":
    sys.exit(main())
