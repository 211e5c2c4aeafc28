"""The quickstart's table, from its summary.json."""

from typing import Any

from rich.console import Console
from rich.table import Table

from megatron_dmc.report.readers.quickstart import CACHE_TOKENS, RUNS

CAPTION = (
    "All rows read the same held-out samples. The log's numbers differ: its held-out lines read other held-out samples, its "
    f"other lines training batches. The cache is measured on one text of {CACHE_TOKENS} tokens."
)


COLUMNS = (
    "model",
    "target CR",
    "CR",
    "nats/token",
    "perplexity",
    "nats/byte",
    "over control",
    f"cache at {CACHE_TOKENS} tokens",
)


def show(summary: dict[str, Any], console: Console) -> None:
    """The quickstart's table, and the text that the exported model wrote."""
    made = {"recipe/final": summary["generation"]["dmc"], "control/final": summary["generation"]["control"]}
    speed = {checkpoint: f"{each['tokens_per_second']:.0f}" for checkpoint, each in made.items()}
    table = Table(title="held-out text", caption=CAPTION, caption_justify="left")
    for column in (*COLUMNS, "tokens/s"):
        table.add_column(column, justify="left" if column == "model" else "right")
    for checkpoint, row in rows(summary).items():
        table.add_row(*row, speed.get(checkpoint, ""))
    console.print(table)
    if (recall := recall_line(summary)) is not None:
        console.print(recall, highlight=False)
    console.print("\n[bold]hf/ continues a text:[/bold]")
    console.print(summary["generation"]["dmc"]["text"], markup=False, highlight=False)


def rows(summary: dict[str, Any]) -> dict[str, tuple[str, ...]]:
    """{checkpoint: texts of :data:`COLUMNS`}: what two runs have in common, so no speed."""
    control = summary["control"]["loss_per_byte"]
    plain = f"{summary['dmc'][0]['plain_cache_bytes'] / 1024:.0f} KiB"
    found: dict[str, tuple[str, ...]] = {
        summary[name]["checkpoint"]: (name, "", "1.00", *_losses(summary[name], control), plain)
        for name in ("base", "control")
    }
    for row in summary["dmc"]:
        found[row["checkpoint"]] = (
            f"DMC {RUNS[row['run']]}",
            f"{row['target_compression_ratio']:g}",
            f"{row['compression_ratio']:.2f}",
            *_losses(row, control),
            f"{row['cache_bytes'] / 1024:.0f} of {row['plain_cache_bytes'] / 1024:.0f} KiB",
        )
    return found


def recall_line(summary: dict[str, Any]) -> str | None:
    """What copying from the context costs every model at its final ratio; None for results that do not say it."""
    final = [row for row in summary["dmc"] if row["checkpoint"].endswith("/final")]
    named = {"base": summary["base"], "control": summary["control"]} | {RUNS[row["run"]]: row for row in final}
    if any(row.get("recall_loss") is None for row in named.values()):
        return None
    models = "; ".join(f"{name} {row['recall_loss']:.2f}" for name, row in named.items())
    return f"recall (nats per token on the second copy of a text): {models}"


def _losses(row: dict[str, Any], control: float) -> tuple[str, str, str, str]:
    over = row["loss_per_byte"] - control
    return f"{row['loss']:.4f}", f"{row['perplexity']:.2f}", f"{row['loss_per_byte']:.4f}", f"{over:+.4f}"
