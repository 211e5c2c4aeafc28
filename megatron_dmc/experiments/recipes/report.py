"""The tables and the figure of docs/small_model.md, from results.json."""

from collections.abc import Sequence
from pathlib import Path
from typing import Any

from matplotlib.backends.backend_agg import FigureCanvasAgg
from matplotlib.figure import Figure

from megatron_dmc.files import write_whole

BEGIN, END = "<!-- results:begin (written by make recipes) -->", "<!-- results:end -->"

LABELS = {
    ("neuron", "merge", False): "paper's form (`neuron`)",
    ("recipe", "merge", False): "`projection`",
    ("recipe", "merge", True): "`projection`, merge, window",
    ("recipe", "evict", True): "`projection`, evict, window",
    ("adapter", "merge", True): "adapter, distilled, merge, window",
    ("adapter", "evict", True): "adapter, distilled, evict, window",
}
COLORS = {"merge": "tab:blue", "evict": "tab:orange"}


def table(results: dict[str, Any]) -> str:
    """The comparison at equal ratios; rows of several seeds as mean and range."""
    lines = [
        "| decisions | window | target | CR | nats/byte | over control | over base | cache at 2048 tokens |",
        "|---|---|---|---|---|---|---|---|",
    ]
    for name in ("base", "control"):
        row = results[name]
        over = [row["loss_per_byte"] - results[other]["loss_per_byte"] for other in ("control", "base")]
        lines.append(f"| {name} | | | 1.00 | {row['loss_per_byte']:.4f} | {over[0]:+.4f} | {over[1]:+.4f} | |")
    for row in sorted(compared(results), key=lambda row: row["row"]["ratio"]):
        found, seeds = row["row"], [row, *same_but_seed(results, row)]
        label = LABELS[found["recipe"], found["operation"], found["local_window"] > 0]
        losses = [each["loss_per_byte"] for each in seeds]
        ratios = [each["compression_ratio"] for each in seeds]
        over = [mean(losses) - results[name]["loss_per_byte"] for name in ("control", "base")]
        spread = f" ({min(losses):.4f}–{max(losses):.4f}, {len(seeds)} seeds)" if len(seeds) > 1 else ""
        lines.append(
            f"| {label} | {found['local_window']} | {found['ratio']} | {mean(ratios):.2f} | {mean(losses):.4f}{spread} | "
            f"{over[0]:+.4f} | {over[1]:+.4f} | {mean([each['cache_bytes'] for each in seeds]) / 1024:.0f} KiB |"
        )
    return "\n".join(lines)


def sweep(results: dict[str, Any]) -> str:
    """Nats per byte over the control, by window and ratio; merge and evict side by side."""
    cells = {
        (row["row"]["ratio"], row["row"]["local_window"], row["row"]["operation"]): row
        for row in results.values()
        if "row" in row and row["row"]["recipe"] == "recipe" and not row["row"]["seed"]
    }
    ratios, windows = (sorted({key[i] for key in cells}) for i in (0, 1))
    lines = [
        "| window | " + " | ".join(f"CR {ratio}: merge | evict | difference" for ratio in ratios) + " |",
        "|---" * (1 + 3 * len(ratios)) + "|",
    ]
    control = results["control"]["loss_per_byte"]
    for window in windows:
        shown = [str(window)]
        for ratio in ratios:
            pair = [cells.get((ratio, window, operation)) for operation in ("merge", "evict")]
            over = [None if row is None else row["loss_per_byte"] - control for row in pair]
            shown += ["–" if x is None else f"{x:+.4f}" for x in over]
            shown.append("" if None in over else f"{over[0] - over[1]:+.4f}")  # type: ignore[operator]
        lines.append("| " + " | ".join(shown) + " |")
    return "\n".join(lines)


def compared(results: dict[str, Any]) -> list[dict[str, Any]]:
    """The rows of the comparison: no further seeds, no sweep."""
    rows = [
        row for row in results.values() if "row" in row and not row["row"]["seed"] and row["row"]["ratio"] in (4, 8)
    ]
    return [row for row in rows if row["row"]["local_window"] in (0, 16)]


def same_but_seed(results: dict[str, Any], row: dict[str, Any]) -> list[dict[str, Any]]:
    wanted = {**row["row"], "seed": None}
    return [
        other
        for other in results.values()
        if "row" in other and other["row"]["seed"] and {**other["row"], "seed": None} == wanted
    ]


def mean(values: Sequence[float]) -> float:
    return sum(values) / len(values)


def spread(values: Sequence[float], form: str = ".3f") -> str:
    """The mean, and the range of several."""
    between = f" ({min(values):{form}} to {max(values):{form}})" if len(values) > 1 else ""
    return f"{mean(values):{form}}{between}"


def draw(results: dict[str, Any]) -> Figure:
    """What a ratio costs, row by row; and what the window is worth."""
    figure = Figure(figsize=(12, 4.2), layout="constrained")
    FigureCanvasAgg(figure)
    cost, windows = figure.subplots(1, 2)
    control = results["control"]["loss_per_byte"]
    lines: dict[str, list[tuple[float, float]]] = {}
    for row in compared(results):
        label = LABELS[row["row"]["recipe"], row["row"]["operation"], row["row"]["local_window"] > 0].replace("`", "")
        lines.setdefault(label, []).append((row["compression_ratio"], row["loss_per_byte"] - control))
    for label, points in lines.items():
        cost.plot(*zip(*sorted(points), strict=True), "o-", label=label)
    cost.axhline(0, color="gray", linestyle="--", label="control")
    cost.axhline(results["base"]["loss_per_byte"] - control, color="gray", linestyle=":", label="base")
    cost.set_xlabel("compression ratio, the window's tokens counted")
    cost.set_ylabel("nats per byte over the control")
    cost.set_title("what a ratio costs, held-out text")
    cost.grid(alpha=0.3)
    # Between the rows with all weights trained and those of a frozen base.
    cost.legend(fontsize=8, ncol=2, loc="center", bbox_to_anchor=(0.5, 0.45))

    styles = {2: ":", 4: "--", 8: "-"}
    for operation, color in COLORS.items():
        for ratio, style in styles.items():
            points = sorted(
                (row["row"]["local_window"], row["loss_per_byte"] - control)
                for row in results.values()
                if "row" in row
                and (row["row"]["recipe"], row["row"]["ratio"], row["row"]["seed"]) == ("recipe", ratio, 0)
                and (row["row"]["operation"] == operation)
            )
            if points:
                label = f"{operation}, target {ratio}"
                windows.plot(*zip(*points, strict=True), style, marker="o", color=color, label=label)
    windows.set_xscale("symlog", base=4, linthresh=1)
    windows.xaxis.set_major_formatter("{x:.0f}")
    windows.set_xlabel("local_window (tokens)")
    windows.set_title("what the window is worth (projection)")
    windows.grid(alpha=0.3)
    windows.legend(fontsize=8, handlelength=4)
    return figure


def replace_section(page: Path, begin: str, end: str, parts: Sequence[str]) -> None:
    """Puts parts between two marks of a page, in place of what stands there."""
    before, _, rest = page.read_text(encoding="utf-8").partition(begin)
    _, _, after = rest.partition(end)
    write_whole(page, before + "\n\n".join((begin, *parts, end)) + after)


def write(results: dict[str, Any], docs: Path) -> None:
    """Replaces the measured section of ``small_model.md`` and its figure."""
    parts = (table(results), sweep(results), "![Ratio and loss of every recipe](figures/recipes.png)")
    replace_section(docs / "small_model.md", BEGIN, END, parts)
    draw(results).savefig(docs / "figures" / "recipes.png", dpi=110)
