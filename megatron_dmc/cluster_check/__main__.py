"""``make cluster-check``: runs every layout that fits here, prints a table, and fails if one computes something else."""

import argparse
import json
import shutil
import sys
from pathlib import Path

import torch

from megatron_dmc.cluster_check.cases import cases_here
from megatron_dmc.cluster_check.launch import CheckError, run_layouts
from megatron_dmc.cluster_check.layouts import REFERENCE, all_layouts
from megatron_dmc.cluster_check.report import is_good, make_report, remarks, table, write_section

HEADING = "## Every layout computes the same"
CPU_PROCESSES, MOST_GPUS = 8, 16


def main() -> int:
    parser = argparse.ArgumentParser(prog="cluster-check", description=__doc__)
    parser.add_argument("--folder", type=Path, default=Path("runs/cluster_check"), help="where runs and results go")
    parser.add_argument("--layouts", nargs="+", help="names of layouts; default: all that fit")
    parser.add_argument("--cases", nargs="+", help="names of cases; default: all")
    parser.add_argument("--document", type=Path, help="a page whose section is to be written anew")
    options = parser.parse_args()
    available = min(torch.cuda.device_count(), MOST_GPUS) if torch.cuda.is_available() else CPU_PROCESSES
    # A layout of more than this machine has is named all the same.
    most = max(available, CPU_PROCESSES)
    layouts = [x for x in all_layouts(most) if options.layouts is None or x.name in (REFERENCE, *options.layouts)]
    cases = [x for x in cases_here() if options.cases is None or x.name in options.cases]
    left_out = {x.name: f"needs {x.processes} GPUs, here are {available}" for x in layouts if x.processes > available}
    shutil.rmtree(options.folder, ignore_errors=True)
    fitting = [x for x in layouts if x.name not in left_out]
    try:
        failures = run_layouts(options.folder, fitting, cases, most)
    except CheckError as error:
        print(f"cluster-check: {error}", file=sys.stderr)
        return 1
    report = make_report(options.folder, layouts, cases, failures, left_out)
    (options.folder / "results.json").write_text(json.dumps(report, indent=1) + "\n")
    print("\n".join([report["machine"], "", *table(report), "", *remarks(report)]))
    if options.document is not None:
        write_section(report, options.document, HEADING)
    return 0 if is_good(report) else 1


if __name__ == "__main__":
    sys.exit(main())
