"""The table of docs/choosing.md that is measured on a real model."""

from pathlib import Path
from typing import Any

from megatron_dmc.experiments.real_model.page import markdown_table
from megatron_dmc.experiments.recipes.report import mean, replace_section, spread

BEGIN = "<!-- real-model:begin (written by make recipes MODEL=smollm2) -->"
END = "<!-- real-model:end -->"


def table(results: dict[str, Any]) -> str:
    """A line for every operation, window and ratio: the mean over seeds, and the range where there are several.

    Args:
        results: ``base``, ``tokens``, and ``rows`` with ratio, operation, local_window, seed, compression_ratio, loss, kl,
            copying and recall_over_base.
    """
    base = results["base"]
    lengths = [each["tokens"] for each in base["copying"]]
    columns = ["operation", "window", "target", "CR", "loss over base", "KL"]
    columns += [*(f"copying, {tokens} tokens" for tokens in lengths), "recall over base", "seeds"]
    lines = [["base", "", "", "1", "", "", *(f"{each['loss']:.3f}" for each in base["copying"]), "", ""]]
    groups: dict[tuple[int, str, int], list[dict[str, Any]]] = {}
    for row in results["rows"]:
        groups.setdefault((row["ratio"], row["operation"], row["local_window"]), []).append(row)
    for (ratio, operation, window), rows in sorted(groups.items()):
        copying = [[row["copying"][i]["loss"] for row in rows] for i in range(len(lengths))]
        recall = [row["recall_over_base"] for row in rows]
        cells = [operation, str(window), str(ratio), f"{mean([row['compression_ratio'] for row in rows]):.2f}"]
        cells += [spread([row["loss"] - base["loss"] for row in rows], "+.3f"), spread([row["kl"] for row in rows])]
        cells += [*map(spread, copying), "" if None in recall else spread(recall, ".0%"), str(len(rows))]
        lines.append(cells)
    return markdown_table(columns, lines)


def write(results: dict[str, Any], docs: Path) -> None:
    """Replaces the measured section of ``choosing.md``."""
    replace_section(docs / "choosing.md", BEGIN, END, [table(results)])
