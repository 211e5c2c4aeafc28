"""From the rows of a check to what somebody reads: tables, and the same as plain values."""

import json
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import common

from gpu.run import ROWS

Row = dict[str, Any]
COSTS = ("kernels", "busy_ms", "peak_mib")


def read_rows(folder: Path) -> list[Row]:
    return [json.loads(line) for line in (folder / ROWS).read_text(encoding="utf-8").splitlines()]


def summary(card: str, rows: Sequence[Row]) -> dict[str, Any]:
    """Plain values; ``failed`` says whether a bound was exceeded or something broke.

    Args:
        card: the GPU by name.
    """
    parts = list(dict.fromkeys(row["part"] for row in rows))
    checks, broken = _of_kind(rows, "check"), _of_kind(rows, "failed")
    exceeded = [row for row in checks if not row["ok"]]
    return {
        "card": card,
        "failed": bool(exceeded or broken),
        "parts": [_part([row for row in rows if row["part"] == name]) for name in parts],
        "exceeded": exceeded,
        "broken": broken,
        "skipped": _of_kind(rows, "skipped"),
        "checks": _worst(checks),
        "times": [row | _cost(row, rows) for row in _of_kind(rows, "time")],
        "waits": _of_kind(rows, "waits"),
        "notes": _of_kind(rows, "note"),
    }


def text(summary: dict[str, Any]) -> str:
    """Tables for a terminal; the name of the card first and last."""
    lines = [f"gpu-check on {summary['card']}", ""]
    for row in summary["notes"]:
        lines.append(f"{row['part']}: " + ", ".join(f"{k} {v}" for k, v in _content(row).items() if k != "said"))
    lines += ["", *_table("parts", summary["parts"])]
    lines += _table("relative errors of bf16, the largest of each check over its bound", summary["checks"])
    for name in dict.fromkeys(row["part"] for row in summary["times"]):
        lines += _table(f"{name}: times", [_content(row) for row in summary["times"] if row["part"] == name])
    lines += _table("times that the host waits for the GPU in one step", [_content(row) for row in summary["waits"]])
    lines += [f"SKIPPED: {row['part']}, {row['name']}: {row['reason']}" for row in summary["skipped"]]
    lines += [f"FAILED: {row['part']}, {row['name']}: {row['error']}" for row in summary["broken"]]
    for row in summary["exceeded"]:
        lines.append(f"FAILED: {row['check']}, {row['quantity']}: {float(row['error']):.2e} > {row['bound']:.2e}")
    verdict = "FAILED" if summary["failed"] else "nothing failed"
    return "\n".join([*lines, f"{verdict}, on {summary['card']}"])


def _of_kind(rows: Sequence[Row], kind: str) -> list[Row]:
    return [row for row in rows if row["kind"] == kind]


def _content(row: Row) -> Row:
    return {name: value for name, value in row.items() if name not in ("t", "part", "kind")}


def _cost(timed: Row, rows: Sequence[Row]) -> Row:
    """The kernels and memory of what was timed; empty if that row was never made."""
    for row in _of_kind(rows, "cost"):
        same = {name: value for name, value in row.items() if name not in ("t", "kind", *COSTS)}
        if all(timed.get(name) == value for name, value in same.items()):
            return {name: row[name] for name in COSTS}
    return {}


def _part(rows: Sequence[Row]) -> Row:
    """One part's line of the table; what was skipped or broke inside a part is counted."""
    checks, done = _of_kind(rows, "check"), _of_kind(rows, "done")
    return {
        "part": rows[0]["part"],
        "ended": "yes" if done else "no",
        "seconds": done[0]["seconds"] if done else None,
        "checks": len(checks),
        "exceeded": sum(not row["ok"] for row in checks),
        "times": len(_of_kind(rows, "time")),
        "broken": len(_of_kind(rows, "failed")),
        "skipped": len(_of_kind(rows, "skipped")),
    }


def _worst(checks: Sequence[Row]) -> list[Row]:
    """Of each check the error that is largest over its bound, and every error without a bound."""
    worst: dict[str, Row] = {}
    for row in checks:
        name = row["check"] if row["bound"] is not None else f"{row['check']}, {row['quantity']}"
        if name not in worst or _over_bound(row) > _over_bound(worst[name]):
            worst[name] = row
    return [_content(row) for row in worst.values()]


def _over_bound(row: Row) -> float:
    return float(row["error"]) / (row["bound"] or 1.0)


def _table(title: str, rows: Sequence[Row]) -> list[str]:
    return [title, *common.table_lines(rows), ""] if rows else []
