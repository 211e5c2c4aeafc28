"""What a cluster check found: a table for the terminal, JSON, and a section of a page."""

import json
import platform
from collections.abc import Mapping, Sequence
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from typing import Any

import torch

from megatron_dmc.cluster_check.cases import Case, run_folder
from megatron_dmc.cluster_check.compare import FLIPS, TOLERANCES, compare
from megatron_dmc.cluster_check.layouts import REFERENCE, Layout

Report = dict[str, Any]


def make_report(
    folder: Path,
    layouts: Sequence[Layout],
    cases: Sequence[Case],
    failures: Mapping[tuple[str, str], str],
    left_out: Mapping[str, str],
    not_run: Mapping[str, str] | None = None,
) -> Report:
    """Plain values: the machine, the tolerances, and a row per layout and case.

    Args:
        failures: runs that broke, by names of layout and case, with the reason.
        left_out: layouts that were not run, with the reason.
        not_run: cases that this machine cannot run, with the reason.
    """
    reference = next(layout for layout in layouts if layout.name == REFERENCE)
    rows: list[dict[str, Any]] = []
    for layout in layouts:
        for case in cases:
            row = {"layout": layout.name, "processes": layout.processes, "case": case.name}
            path = run_folder(folder, case, layout) / "result.json"
            if layout.name in left_out:
                rows.append(row | {"outcome": "left out", "reason": left_out[layout.name]})
            elif (layout.name, case.name) in failures or not path.exists():
                why = failures.get((layout.name, case.name), "not run, because another case of this layout broke")
                rows.append(row | {"outcome": "failed", "reason": why})
            elif "refused" in (result := json.loads(path.read_text())):
                rows.append(row | {"outcome": "left out", "reason": result["refused"]})
            elif layout.name != REFERENCE:
                expected = json.loads((run_folder(folder, case, reference) / "result.json").read_text())
                difference = compare(result["steps"], expected["steps"], case.precision)
                outcome = "same" if difference.allowed else "different"
                rows.append(row | {"outcome": outcome, "precision": case.precision, **vars(difference)})
    precisions = {case.precision for case in cases}
    tolerances, flips = ({x: limits[x] for x in limits if x in precisions} for limits in (TOLERANCES, FLIPS))
    return {
        "machine": _machine(),
        "tolerances": tolerances,
        "flips": flips,
        "rows": rows,
        "not_run": dict(not_run or {}),
    }


def is_good(report: Report) -> bool:
    """Nothing differs and nothing broke; what cannot run here does not count."""
    return all(row["outcome"] in ("same", "left out") for row in report["rows"])


def table(report: Report) -> list[str]:
    """Markdown lines: worst relative difference by layout and case."""
    names = list(dict.fromkeys(row["case"] for row in report["rows"]))
    lines = ["| layout | processes | " + " | ".join(names) + " |", "|---|---|" + "---|" * len(names)]
    for layout in dict.fromkeys(row["layout"] for row in report["rows"]):
        cells = {row["case"]: row for row in report["rows"] if row["layout"] == layout}
        processes = next(iter(cells.values()))["processes"]
        lines.append(f"| {layout} | {processes} | " + " | ".join(_cell(cells.get(name)) for name in names) + " |")
    return lines


def remarks(report: Report) -> list[str]:
    """One line for each result that is not simply the same."""
    lines = []
    for row in report["rows"]:
        name = f"{row['layout']}, {row['case']}"
        if row["outcome"] == "left out":
            lines.append(f"{row['layout']} is left out: {row['reason']}")
        elif row["outcome"] == "failed":
            lines.append(f"{name} failed: {row['reason']}")
        elif row["outcome"] == "different":
            lines.append(
                f"{name} differs: {row['quantity']} of step {row['step']} by {row['relative']:.1e}, and {row['flips']} of "
                f"{row['decisions']} decisions"
            )
    lines += [f"{name} was not run: {why}" for name, why in report["not_run"].items()]
    return list(dict.fromkeys(lines))


def verdict(report: Report) -> str:
    """The last line: whether all agrees, how far results differ at most, and how far they may."""
    outcomes = [row["outcome"] for row in report["rows"]]
    compared = [row for row in report["rows"] if "relative" in row]
    failed, left_out = outcomes.count("failed"), outcomes.count("left out")
    if not compared and not failed:
        return "no layout was compared with one process"
    differences = ", ".join(
        f"{_number(max(relative))} in {precision} (tolerance {tolerance:.0e})"
        for precision, tolerance in report["tolerances"].items()
        if (relative := [row["relative"] for row in compared if row["precision"] == precision])
    )
    if is_good(report):
        layouts, cases = (len({row[key] for row in compared}) for key in ("layout", "case"))
        what = f"{_count(layouts, 'layout')} x {_count(cases, 'case')}"
        if left_out:
            what += f" ({left_out} of {len(outcomes)} results left out)"
        return f"{what} agree with one process: largest difference {differences}"
    numbers = {"different from one process": outcomes.count("different"), "failed": failed, "left out": left_out}
    wrong = ", ".join(f"{number} {what}" for what, number in numbers.items() if number)
    return f"FAILED: of {_count(len(outcomes), 'result')} {wrong}; largest difference {differences or 'unknown'}"


def write_section(report: Report, page: Path, heading: str) -> None:
    """Replaces the text between a heading of a Markdown page and the next heading of its level."""
    lines = page.read_text(encoding="utf-8").splitlines()
    begin = lines.index(heading) + 1
    marks = heading.split(" ")[0] + " "
    end = next((i for i in range(begin, len(lines)) if lines[i].startswith(marks)), len(lines))
    section = ["", *_introduction(report), "", *table(report), ""]
    notes = remarks(report)
    if notes:
        section += [*(f"- {note}" for note in notes), ""]
    page.write_text("\n".join(lines[:begin] + section + lines[end:]).rstrip() + "\n", encoding="utf-8")


def _introduction(report: Report) -> list[str]:
    limits = ", ".join(
        f"{tolerance:.0e} and {report['flips'][precision]:.1%} of the decisions in {precision}"
        for precision, tolerance in report["tolerances"].items()
    )
    return [
        f"Written by `make cluster-check` on {report['machine']}.",
        "Largest relative difference from one process over all steps, of losses, ratios and gradient norm. In brackets the",
        "decisions that came out differently, where any did. Allowed are",
        f"{limits}.",
    ]


def _cell(row: dict[str, Any] | None) -> str:
    if row is None:
        return ""
    if row["outcome"] in ("left out", "failed"):
        return str(row["outcome"]).upper() if row["outcome"] == "failed" else "left out"
    flips = f" ({row['flips']})" if row["flips"] else ""
    difference = _number(row["relative"])
    return f"{difference}{flips}" if row["outcome"] == "same" else f"**{difference}{flips} DIFFERENT**"


def _number(difference: float) -> str:
    return f"{difference:.1e}" if difference else "0"


def _count(number: int, noun: str) -> str:
    return f"{number} {noun}" if number == 1 else f"{number} {noun}s"


def _machine() -> str:
    if torch.cuda.is_available():
        where = f"{torch.cuda.device_count()} x {torch.cuda.get_device_name()}, NCCL"
        engine = _version("transformer-engine")
        where += f", Transformer Engine {engine}" if engine else ", without Transformer Engine"
    else:
        where = f"a CPU ({platform.machine()}), gloo"
    return f"{where}, torch {torch.__version__}, megatron-core {_version('megatron-core')}"


def _version(package: str) -> str | None:
    try:
        return version(package)
    except PackageNotFoundError:
        return None
