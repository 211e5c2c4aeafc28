"""A quickstart's folder."""

from pathlib import Path
from typing import Any

from megatron_dmc.report.curves import event_folders
from megatron_dmc.report.readers.values import (
    an_object,
    count,
    heads,
    number,
    objects,
    optional,
    positive,
    taken_from,
    text,
)
from megatron_dmc.report.run import Measure, Row, Run

# {run: what it is called}, here and in the quickstart's own table.
RUNS = {"recipe": "projection", "adapter": "adapter, distilled", "neuron": "paper's form"}
# Held-out tokens that the cache is measured on.
CACHE_TOKENS = 2048
REMEDY = "remove it, and run megatron-dmc quickstart again"
_COMMAND = "megatron-dmc quickstart-evaluate"
_LOSS = Measure("loss, held-out text", "nats/byte")
_COPYING = Measure("copying: a text twice", "nats/token on the second copy")


def read(path: Path, summary: dict[str, Any]) -> Run:
    """Raises ConfigError where the summary, read from ``path``, is damaged."""
    with taken_from(path, REMEDY):
        models = objects(summary, "dmc")
        plain = positive(models[0], "plain_cache_bytes")
        rows = [_plain(name, an_object(summary, name), plain) for name in ("base", "control")]
        rows += [_compressed(row) for row in models]
    folder = path.parent
    return Run(
        folder,
        "a quickstart: a small model, pretrained and retrofitted on one machine",
        rows=rows,
        bytes_tokens=CACHE_TOKENS,
        curves=event_folders(folder / "tensorboard"),
        training=[f"megatron-dmc retrofit examples/quickstart/{name}.yaml" for name in RUNS],
        models=[folder / "hf"],
        text=[folder / "data" / "valid"],
    )


def _plain(name: str, row: dict[str, Any], cache_bytes: float) -> Row:
    return Row(name, name, name, 1.0, cache_bytes=cache_bytes, values=_values(row), commands=[_COMMAND])


def _compressed(row: dict[str, Any]) -> Row:
    run = text(row, "run")
    return Row(
        text(row, "checkpoint"),
        run,
        f"DMC {RUNS.get(run, run)}",
        positive(row, "compression_ratio"),
        target=positive(row, "target_compression_ratio"),
        cache_bytes=count(row, "cache_bytes"),
        values=_values(row),
        heads=optional(heads, row, "layer_head_compression_ratio"),
        commands=[_COMMAND],
    )


def _values(row: dict[str, Any]) -> dict[Measure, float]:
    # Results of an older version have no recall loss.
    recall = optional(number, row, "recall_loss")
    return {_LOSS: number(row, "loss_per_byte")} | ({} if recall is None else {_COPYING: recall})
