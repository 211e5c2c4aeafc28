"""The comparison's table, in the terminal and in docs/results.md."""

import json
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

from rich.console import Console
from rich.table import Table

from megatron_dmc.experiments.compare.rows import LABELS
from megatron_dmc.experiments.real_model.page import markdown_table
from megatron_dmc.experiments.recipes.report import mean, replace_section, spread
from megatron_dmc.files import write_whole

BEGIN = "<!-- comparison:begin (written by megatron-dmc compare --model smollm2) -->"
END = "<!-- comparison:end -->"
_RESULTS = Path("compare", "smollm2.json")
_SECTION = """## Beside other methods

`megatron-dmc compare --model smollm2` made this section ([comparison.md](comparison.md) says what each row is). What trains
reads {tokens:,} tokens, DMC's calibration among them. Machine: {cores} cores ({architecture}), torch {torch}, transformers
{transformers}.

*CR* is tokens per slot in a text of {served} tokens, or bytes of the plain cache over its own. *Loss over base* and *KL* are
those of the last 64 of {continued} tokens, with what is before them in the cache, {copies} texts. *Recall over base* is the
mean of accuracy over the base's, of the tasks that the base can do, {samples} samples each at every length. *Minutes* are
those of the training, on that machine. Several seeds: the mean, and the range."""


def columns(results: dict[str, Any]) -> list[str]:
    base = results["base"]
    served, continued = base["serving"][-1]["tokens"], base["continued"][-1]["tokens"]
    return [
        "method",
        "asked",
        "CR",
        f"cache, {served} tokens",
        f"loss over base after {continued} tokens",
        "KL there",
        "KL, whole texts",
        "copying",
        "recall over base",
        "tokens/s over plain",
        "trained on",
        "minutes",
        "seeds",
    ]


def rows(results: dict[str, Any]) -> list[list[str]]:
    """Texts of the columns, of every method and ratio: the mean over seeds, and the range where there are several."""
    groups: dict[tuple[int, float], list[dict[str, Any]]] = {}
    order = list(LABELS)
    for row in results["rows"]:
        groups.setdefault((order.index(row["method"]), row["ratio"]), []).append(row)
    found = [_base_row(results["base"])]
    for (_, ratio), same in sorted(groups.items()):
        reports = [row["report"] for row in same]
        over = [each["continued"][-1]["loss"] - results["base"]["continued"][-1]["loss"] for each in reports]
        tokens, seconds = same[0]["trained_tokens"], [row["training_seconds"] for row in same]
        found.append(
            [
                same[0]["label"],
                f"{ratio:g}",
                spread([compression_ratio(each) for each in reports], ".2f"),
                f"{mean([each['serving'][-1]['cache_bytes'] for each in reports]) / 1e6:.1f} MB",
                spread(over, "+.3f"),
                spread([each["continued"][-1]["kl"] for each in reports]),
                _of_all(reports, lambda each: each.get("kl"), ".4f"),
                _of_all(reports, lambda each: each["copying"][-1]["loss"], ".3f") if "copying" in reports[0] else "",
                _of_all(same, lambda row: row["recall_over_base"], ".0%"),
                f"{mean([_speed(each) for each in reports]):.2f}",
                f"{tokens / 1000:.0f} k" if tokens else "",
                "" if None in seconds else f"{mean(seconds) / 60:.0f}",
                str(len(same)) if same[0]["seed"] is not None else "",
            ]
        )
    return found


def _base_row(base: dict[str, Any]) -> list[str]:
    size = f"{base['serving'][-1]['cache_bytes'] / 1e6:.1f} MB"
    return ["base", "", "1", size, "", "", "", f"{base['copying'][-1]['loss']:.3f}", "", "", "", "", ""]


def compression_ratio(report: dict[str, Any]) -> float:
    """Tokens per slot of the longest text that was served; of a cache with other slots, its bytes against the plain one's."""
    served = report["serving"][-1]
    return float(served.get("compression_ratio") or served["plain_cache_bytes"] / served["cache_bytes"])


def _speed(report: dict[str, Any]) -> float:
    served = report["serving"][-1]
    return float(served["tokens_per_second"] / served["plain_tokens_per_second"])


def _of_all(rows: Sequence[dict[str, Any]], value: Callable[[dict[str, Any]], float | None], form: str) -> str:
    found = [value(row) for row in rows]
    return "" if None in found else spread([each for each in found if each is not None], form)


def show(results: dict[str, Any], console: Console) -> None:
    """The table in the terminal."""
    table = Table(title=f"{results['model']['name']}: ways to a smaller cache")
    for column in columns(results):
        table.add_column(column, justify="left" if column == "method" else "right")
    for row in rows(results):
        table.add_row(*row)
    console.print(table)


def section(examples: Path) -> str:
    """Of docs/results.md: what ``examples/compare/smollm2.json`` holds, between its marks; nothing but these where it is not
    there."""
    path = examples / _RESULTS
    text = "\n\n".join(_parts(json.loads(path.read_text(encoding="utf-8")))) if path.exists() else ""
    return f"{BEGIN}\n\n{text}\n\n{END}"


def write(results: dict[str, Any], root: Path) -> None:
    """Writes ``examples/compare/smollm2.json`` and the section of docs/results.md in a checkout."""
    write_whole(root / "examples" / _RESULTS, json.dumps(results, indent=1) + "\n")
    replace_section(root / "docs" / "results.md", BEGIN, END, _parts(results))


def _parts(results: dict[str, Any]) -> list[str]:
    machine, served = results["machine"], results["base"]["serving"][-1]
    text = _SECTION.format(
        tokens=results["tokens"],
        samples=results["base"]["amount"]["samples"],
        copies=results["base"]["amount"]["copies"],
        continued=results["base"]["continued"][-1]["tokens"],
        served=served["tokens"],
        **{name: machine[name] for name in ("cores", "architecture", "torch", "transformers")},
    )
    return [text, markdown_table(columns(results), rows(results))]
