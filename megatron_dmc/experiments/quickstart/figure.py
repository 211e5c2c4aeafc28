"""Draws the quickstart's summary.json: what compression costs, and what it saves, head by head."""

import json
from pathlib import Path
from typing import Any

import numpy as np
from matplotlib.backends.backend_agg import FigureCanvasAgg
from matplotlib.colors import LogNorm
from matplotlib.figure import Figure

from megatron_dmc.report.readers.quickstart import RUNS


def draw(summary: dict[str, Any]) -> Figure:
    """Loss over the control against the ratio, bytes held at 2048 tokens, and the main model's ratio per head."""
    figure = Figure(figsize=(12, 3.6), layout="constrained")
    FigureCanvasAgg(figure)
    loss, held, heads = figure.subplots(1, 3, width_ratios=(1.2, 1, 1))
    control = summary["control"]["loss_per_byte"]
    for run, label in RUNS.items():
        rows = [row for row in summary["dmc"] if row["run"] == run]
        ratios = [1.0] + [row["compression_ratio"] for row in rows]
        over = [_uncompressed(summary, rows[0])] + [row["loss_per_byte"] - control for row in rows]
        loss.plot(ratios, over, "o-", label=label)
        loss_ratios = [row["compression_ratio_of_cache"] for row in rows]
        held.plot(loss_ratios, [row["cache_bytes"] / 1024 for row in rows], "o", label=label)
    loss.set_xlabel("compression ratio (tokens per slot)")
    loss.set_ylabel("nats per byte over the control")
    loss.set_title("what it costs, held-out text")
    loss.legend()
    loss.grid(alpha=0.3)

    plain = summary["dmc"][0]["plain_cache_bytes"] / 1024
    ratio = np.linspace(1, max(row["compression_ratio_of_cache"] for row in summary["dmc"]), 50)
    held.plot(ratio, plain / ratio, color="gray", linewidth=1, label="plain / ratio")
    held.axhline(plain, color="gray", linestyle="--", label="plain cache")
    held.set_xlabel("compression ratio of the text")
    held.set_ylabel("KiB held after 2048 tokens")
    held.set_ylim(0)
    held.set_title("what it saves")
    held.legend()
    held.grid(alpha=0.3)

    main = next(row for row in reversed(summary["dmc"]) if row["run"] == "recipe")
    table = np.asarray(main["layer_head_compression_ratio"])
    image = heads.imshow(table, norm=LogNorm(1, max(table.max(), 2)), aspect="auto", cmap="viridis")
    for (layer, head), value in np.ndenumerate(table):
        heads.text(head, layer, f"{value:.1f}", ha="center", va="center", color="white")
    heads.set_xticks(range(table.shape[1]))
    heads.set_yticks(range(table.shape[0]))
    heads.set_xlabel("KV head")
    heads.set_ylabel("layer")
    heads.set_title("ratio of every head (projection)")
    figure.colorbar(image, ax=heads)
    return figure


def _uncompressed(summary: dict[str, Any], row: dict[str, Any]) -> float:
    """What a run loses at ratio 1: an adapter is its frozen base there, the others have been trained on as the control has."""
    return summary["base"]["loss_per_byte"] - summary["control"]["loss_per_byte"] if row["train"] == "adapter" else 0.0


def save(summary: Path, image: Path) -> None:
    """Draws ``summary.json``; the whole image or none."""
    partial = image.with_suffix(".partial.png")
    draw(json.loads(summary.read_text())).savefig(partial, dpi=110)
    partial.replace(image)
