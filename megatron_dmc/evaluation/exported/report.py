"""The report of a base, as ``megatron-dmc evaluate`` has written it: whatever is read of it later is checked here."""

import json
from pathlib import Path
from typing import Any

from megatron_dmc.config import ConfigError
from megatron_dmc.evaluation.exported.amount import Amount
from megatron_dmc.files import why_no_file


def read_report(path: str) -> dict[str, Any]:
    """Raises ConfigError for a file that is no report of a base, or of another version."""
    if (problem := why_no_file(Path(path))) is not None:
        raise ConfigError(f"--base {path} {problem}; write it with megatron-dmc evaluate BASE --output {path}")
    try:
        report = json.loads(Path(path).read_text(encoding="utf-8"))
        is_base = _is_base(report)
    except (ValueError, TypeError, KeyError, AttributeError, RecursionError):
        is_base = False
    if not is_base:
        raise ConfigError(
            f"--base {path} is no report of a base; write it with megatron-dmc evaluate BASE --output {path}"
        )
    return report


def _is_base(report: dict[str, Any]) -> bool:
    amount = Amount.from_dict(report["amount"])
    parts = [(row["task"], row["tokens"]) for row in report["recall"]]
    lengths = tuple(each["tokens"] for each in report["copying"])
    return (
        not {"kl", "dmc"} & set(report)
        and all(
            isinstance(report[name], str) and report[name] for name in ("model", "text", "weights", "serving_dtype")
        )
        and (parts, lengths) == (amount.recall_parts, amount.copy_tokens)
        and all(_is_recall(row) for row in report["recall"])
    )


def _is_recall(row: dict[str, Any]) -> bool:
    correct, samples = row["correct"], row["samples"]
    if not isinstance(correct, int) or not isinstance(samples, int) or not 0 <= correct <= samples or not samples:
        return False
    return (
        row["accuracy"] == correct / samples and isinstance(row["counts"], bool) and (correct > 0 or not row["counts"])
    )
