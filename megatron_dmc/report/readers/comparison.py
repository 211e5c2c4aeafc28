"""A folder with ``comparison.json``: methods at several ratios and seeds, measured beside one base."""

from pathlib import Path
from typing import Any

from megatron_dmc.report.curves import event_folders
from megatron_dmc.report.readers.reports import add_report, bytes_tokens, exports, facts_of
from megatron_dmc.report.readers.stages import read_stages, trainings
from megatron_dmc.report.readers.values import (
    an_object,
    count,
    number,
    objects,
    optional,
    positive,
    taken_from,
    text,
)
from megatron_dmc.report.run import Measure, Row, Run

FILE = "comparison.json"
REMEDY = "remove it, and run megatron-dmc compare again"


def read(path: Path, values: dict[str, Any]) -> Run:
    """Raises ConfigError where the comparison, read from ``path``, is damaged."""
    folder = path.parent
    with taken_from(path, REMEDY):
        base, found = an_object(values, "base"), objects(values, "rows")
        rows = [add_report(Row("base", "base", "base", 1.0), base, 1.0), *map(_row, found)]
        read_tokens = [("tokens that a trained row read", f"{count(values, 'tokens'):,}")] if "tokens" in values else []
        stages = read_stages(values)
        return Run(
            folder,
            "a comparison of methods on one model",
            rows=rows,
            facts=facts_of(values, read_tokens),
            stages=stages,
            bytes_tokens=bytes_tokens(base),
            curves=event_folders(folder / "tensorboard"),
            training=trainings(stages),
            models=exports(folder, [row.name for row in rows]),
            text=[folder / "data" / "text_valid", folder / "data" / "valid"],
        )


def _row(values: dict[str, Any]) -> Row:
    ratio = positive(values, "ratio")
    row = Row(
        text(values, "name"),
        text(values, "method"),
        text(values, "label"),
        ratio,
        target=ratio,
        seed=optional(count, values, "seed"),
        commands=_texts(values, "commands"),
        trained_tokens=optional(count, values, "trained_tokens"),
        training_seconds=optional(number, values, "training_seconds"),
    )
    row = add_report(row, an_object(values, "report"), optional(number, values, "recall_over_base"))
    for tokens, score in (optional(an_object, values, "ruler") or {}).items():
        title = f"RULER, {int(tokens):,} tokens"
        row.values[Measure(title, "share of right answers", more_is_better=True)] = number({title: score}, title)
    return row


def _texts(values: dict[str, Any], name: str) -> list[str]:
    found = values.get(name) or []
    if not isinstance(found, list) or not all(isinstance(each, str) for each in found):
        raise ValueError(f"{name} is no list of texts")
    return found
