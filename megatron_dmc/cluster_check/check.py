"""The whole check: what fits on this machine is run, compared, written down and printed."""

import json
from collections.abc import Sequence
from pathlib import Path

import torch

from megatron_dmc.cluster_check.cases import cases_here, cases_not_here
from megatron_dmc.cluster_check.launch import CheckError, clear_folder, run_layouts
from megatron_dmc.cluster_check.layouts import CPU_PROCESSES, MOST_GPUS, REFERENCE, all_layouts
from megatron_dmc.cluster_check.report import is_good, make_report, remarks, table, verdict, write_section


def check(
    folder: Path, layout_names: Sequence[str] | None, case_names: Sequence[str] | None, page: Path | None, heading: str
) -> bool:
    """Whether every layout that fits here computes the same. Leaves ``results.json`` in ``folder``.

    Args:
        layout_names, case_names: None: all of them.
        page: a page of documentation whose section ``heading`` is to be written anew.

    Raises:
        CheckError: a name that is not known on this machine, or the check itself could not be made.
    """
    available = min(torch.cuda.device_count(), MOST_GPUS) if torch.cuda.is_available() else CPU_PROCESSES
    # A layout that needs more than this machine has is named, too.
    most = max(available, CPU_PROCESSES)
    layouts, cases, not_run = all_layouts(most), cases_here(), cases_not_here()
    for option, wanted, known in (
        ("--layouts", layout_names, [layout.name for layout in layouts]),
        ("--cases", case_names, [case.name for case in cases]),
    ):
        for name in wanted or ():
            if name not in known:
                why = f": {not_run[name]}" if name in not_run else ""
                raise CheckError(f"{option} {name} cannot run here{why}; choose among {'; '.join(known)}")
    if layout_names is not None:
        layouts = [layout for layout in layouts if layout.name in (REFERENCE, *layout_names)]
    if case_names is not None:
        cases = [case for case in cases if case.name in case_names]
    left_out = {x.name: f"needs {x.processes} GPUs, here are {available}" for x in layouts if x.processes > available}
    clear_folder(folder)
    failures = run_layouts(folder, [x for x in layouts if x.name not in left_out], cases, most)
    # Without a GPU nobody expects these cases, and whoever names cases did not name them.
    missing = not_run if torch.cuda.is_available() and case_names is None else {}
    report = make_report(folder, layouts, cases, failures, left_out, missing)
    (folder / "results.json").write_text(json.dumps(report, indent=1) + "\n")
    notes = remarks(report)
    print("\n".join([report["machine"], "", *table(report), "", *notes, *[""] * bool(notes), verdict(report)]))
    if page is not None:
        write_section(report, page, heading)
    return is_good(report)
