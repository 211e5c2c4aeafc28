"""Draws the summary of a real model: what it costs, what is recalled, and the ratio of every head."""

from pathlib import Path
from typing import Any

import numpy
from matplotlib.backends.backend_agg import FigureCanvasAgg
from matplotlib.colors import LogNorm
from matplotlib.figure import Figure


def draw(summary: dict[str, Any]) -> Figure:
    """KL by quarter of a window, recall over the base's by length, and a heatmap for the model with the highest ratio."""
    figure = Figure(figsize=(13, 4), layout="constrained")
    FigureCanvasAgg(figure)
    loss, recall, heads = figure.subplots(1, 3, width_ratios=(1, 1.2, 1))
    for row in summary["models"]:
        loss.plot(range(1, 5), row["kl_by_quarter"], "o-", label=row["name"])
    loss.set_xticks(range(1, 5))
    loss.set_xlabel(f"quarter of {summary['base']['amount']['window_tokens']} tokens")
    loss.set_ylabel("KL(base || model), nats per token")
    loss.set_title("what it costs, held-out text")
    loss.set_ylim(0)
    loss.legend()
    loss.grid(alpha=0.3)

    counted = [number for number, base in enumerate(summary["base"]["recall"]) if base["counts"]]
    names = [
        f"{summary['base']['recall'][number]['task']} {summary['base']['recall'][number]['tokens']}"
        for number in counted
    ]
    width = 0.8 / max(len(summary["models"]), 1)
    for place, row in enumerate(summary["models"]):
        values = [row["recall"][number]["over_base"] for number in counted]
        recall.bar([x + place * width for x in range(len(counted))], values, width)  # colors as in the first panel
    recall.axhline(1, color="gray", linestyle="--")
    recall.set_xticks(range(len(counted)), names, rotation=60, ha="right")
    recall.set_ylabel("accuracy over the base's")
    recall.set_title("what is recalled")
    # The last of those with the highest ratio, which is the trained one.
    main = max(reversed(summary["models"]), key=lambda row: row["target_compression_ratio"])
    table = numpy.asarray(main["serving"][0]["layer_head_compression_ratio"])
    image = heads.imshow(table, norm=LogNorm(1, max(table.max(), 2)), aspect="auto", cmap="viridis")
    heads.set_xticks(range(table.shape[1]))
    heads.set_xlabel("KV head")
    heads.set_ylabel("layer")
    heads.set_title(f"tokens per slot, {main['name']}")
    figure.colorbar(image, ax=heads)
    return figure


def save(summary: dict[str, Any], image: Path) -> None:
    """The whole image or none."""
    partial = image.with_suffix(".partial.png")
    draw(summary).savefig(partial, dpi=110)
    partial.replace(image)
