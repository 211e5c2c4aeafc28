"""Rows from reports of ``megatron-dmc evaluate``."""

from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

from megatron_dmc.report.readers.values import an_object, count, facts, heads, number, objects, optional, positive
from megatron_dmc.report.run import Measure, Row, Served

# Sizes of a model, as a summary has them.
MODEL = ("name", "num_hidden_layers", "hidden_size", "num_attention_heads", "num_key_value_heads", "vocab_size")
RECALL = Measure("recall over the base's", "right answers over the base's", more_is_better=True)
_KL, _LOSS = Measure("KL, whole texts", "KL(base || model), nats/token"), Measure("loss, whole texts", "nats/token")


def add_report(row: Row, report: dict[str, Any], recall: float | None) -> Row:
    """``row`` with all that a report says: of the base, or of a model beside it, whose ``recall`` is over the base's.

    Ratio, bytes and heads are those of the report's first, shortest, text for cache and speed. A method that keeps every
    token, with fewer bits or heads, is reported without a ratio there, and keeps the row's own.
    """
    served = objects(report, "serving")
    first = served[0] if served else {}
    ratio = optional(positive, first, "compression_ratio")
    return replace(
        row,
        ratio=row.ratio if ratio is None else ratio,
        cache_bytes=optional(positive, first, "cache_bytes"),
        heads=optional(heads, first, "layer_head_compression_ratio"),
        values=_values(report, recall, is_base=row.method == "base"),
        served=[_served(each) for each in served],
    )


def bytes_tokens(base: dict[str, Any]) -> int | None:
    """Tokens of the text that :func:`add_report` takes ratio and bytes of."""
    served = objects(base, "serving")
    return count(served[0], "tokens") if served else None


def facts_of(values: dict[str, Any], between: Sequence[tuple[str, str]] = ()) -> list[tuple[str, str]]:
    """Of a summary's model, text and machine; ``between`` stand before those of the machine."""
    model, text, machine = (an_object(values, name) for name in ("model", "text", "machine"))
    return [*facts(model, *MODEL), *facts(text), *between, *facts(machine)]


def _served(row: dict[str, Any]) -> Served:
    return Served(
        tokens=count(row, "tokens"),
        batch=optional(count, row, "batch") or 1,
        cache_bytes=positive(row, "cache_bytes"),
        seconds_to_first_token=positive(row, "seconds_to_first_token"),
        tokens_per_second=positive(row, "tokens_per_second"),
    )


def _values(report: dict[str, Any], recall: float | None, *, is_base: bool) -> dict[Measure, float]:
    found: dict[Measure, float | None] = {}
    # Of an older version there is none.
    for row in _longest(report, "continued"):
        after = f"after a context of {count(row, 'tokens'):,} tokens"
        found[Measure(f"KL {after}", "KL(base || model), nats/token")] = 0.0 if is_base else number(row, "kl")
        found[Measure(f"loss {after}", "nats/token")] = number(row, "loss")
    found[RECALL] = recall
    for row in _longest(report, "copying"):
        title = f"copying, {count(row, 'tokens'):,} tokens"
        found[Measure(title, "nats/token on the second of two equal halves")] = number(row, "loss")
    found[_KL] = 0.0 if is_base and "loss" in report else optional(number, report, "kl")
    found[_LOSS] = optional(number, report, "loss")
    return {measure: value for measure, value in found.items() if value is not None}


def _longest(report: dict[str, Any], name: str) -> Sequence[dict[str, Any]]:
    """The last row of a list that goes by length; none where the report has no such list."""
    return objects(report, name)[-1:] if name in report else ()


def exports(folder: Path, names: Sequence[str]) -> list[Path]:
    """``hf-NAME`` in a run's folder, in the order of the names; of those that are there."""
    there = {path.name: path for path in folder.glob("hf-*")}
    return [there[f"hf-{name}"] for name in names if f"hf-{name}" in there]
