"""lm-eval's results as rows: a metric of a task each, with the cache beside it; and the table of them."""

from collections.abc import Mapping
from typing import Any

from rich.console import Console
from rich.table import Table
from rich.text import Text

from megatron_dmc.evaluation.harness.observed import CacheUse

# Of a table that no terminal limits.
_ANY_WIDTH = 10_000


def rows_of(found: Mapping[str, Any], uses: Mapping[str, CacheUse], length: int | None) -> list[dict[str, Any]]:
    """One row for each metric of each task and group that lm-eval reports.

    Returns:
        rows of ``task``, ``length`` (None where a task has none), ``version``, ``num_fewshot``, ``samples``, ``metric``,
        ``filter``, ``value``, ``stderr`` (None where there is none), ``higher_is_better``; and, where a cache was seen,
        ``compression_ratio`` and, of a sequence on average, ``tokens``, ``cache_bytes``, ``plain_cache_bytes``.
    """
    rows = []
    for task, values in found["results"].items():
        use = CacheUse()
        for leaf in _leaves(task, found.get("group_subtasks", {})):
            use.add(uses.get(leaf, CacheUse()))
        for key, value in values.items():
            metric, _, filter_name = key.partition(",")
            if not filter_name or metric.endswith("_stderr"):
                continue
            stderr = values.get(f"{metric}_stderr,{filter_name}")
            rows.append(
                {
                    "task": task,
                    "length": length,
                    "version": found["versions"].get(task),
                    "num_fewshot": found["n-shot"].get(task),
                    "samples": values.get("sample_len"),
                    "metric": metric,
                    "filter": filter_name,
                    "value": value,
                    "stderr": stderr if isinstance(stderr, float | int) else None,
                    "higher_is_better": found["higher_is_better"].get(task, {}).get(metric),
                    **use.report(),
                }
            )
    return rows


def print_rows(report: Mapping[str, Any], console: Console | None = None) -> None:
    """The table of a report of ``evaluate_tasks`` or ``evaluate_ruler``."""
    scores = f"scores of lm-eval {report['lm_eval']}" if "lm_eval" in report else "scores in RULER's own texts"
    table = Table(title=Text(f"{report['model']}: {scores}, and the cache of a sequence"))
    columns = ("samples", "shots", "score", "±", "tokens", "CR", "cache", "plain cache")
    has_lengths = any(row["length"] is not None for row in report["results"])
    for name in ("task", *(["length"] if has_lengths else []), "metric"):
        table.add_column(name)
    for name in columns:
        table.add_column(name, justify="right")
    for row in report["results"]:
        length = [_number(row["length"])] if has_lengths else []
        metric = row["metric"] if row["filter"] == "none" else f"{row['metric']} ({row['filter']})"
        table.add_row(
            Text(row["task"]),
            *length,
            Text(metric),
            _number(row["samples"]),
            _number(row["num_fewshot"]),
            _number(row["value"], ".4f"),
            _number(row["stderr"], ".4f"),
            _number(row.get("tokens"), ",.0f"),
            _number(row.get("compression_ratio"), ".2f"),
            _bytes(row.get("cache_bytes")),
            _bytes(row.get("plain_cache_bytes")),
        )
    console = console or Console()
    if not console.is_terminal:
        console.width = _ANY_WIDTH
    console.print(table)


def _leaves(name: str, members: Mapping[str, list[str]]) -> list[str]:
    """The tasks of a group, through the groups in it; a task's own name."""
    if name not in members:
        return [name]
    return [leaf for member in members[name] for leaf in _leaves(member, members)]


def _number(value: Any, form: str = "") -> str:
    return format(value, form) if isinstance(value, float | int) else "-"


def _bytes(value: float | None) -> str:
    return "-" if value is None else f"{value / 1024:,.1f} KiB"
