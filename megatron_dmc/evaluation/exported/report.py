"""A report that ``megatron-dmc evaluate`` has written: whatever is read of it later is checked here."""

import json
import math
import unicodedata
from pathlib import Path
from typing import Any

from megatron_dmc.config import ConfigError
from megatron_dmc.evaluation.exported.amount import Amount
from megatron_dmc.evaluation.exported.text_loss import QUARTERS
from megatron_dmc.files import LONGEST_PATH, why_no_file

# Numbers of a row of ``serving``.
_SERVED = ("cache_bytes", "seconds_to_first_token", "tokens_per_second")


def read_report(path: str) -> dict[str, Any]:
    """Raises ConfigError for a file that is no report of a base, or of another version."""
    if (problem := why_no_file(Path(path))) is not None:
        raise ConfigError(f"--base {path} {problem}; write it with megatron-dmc evaluate BASE --output {path}")
    try:
        report = json.loads(Path(path).read_text(encoding="utf-8"))
    except (ValueError, RecursionError):
        report = None
    if not isinstance(report, dict) or not is_report(report):
        raise ConfigError(
            f"--base {path} is no report of a base; write it with megatron-dmc evaluate BASE --output {path}"
        )
    return report


def is_report(report: dict[str, Any], base: dict[str, Any] | None = None) -> bool:
    """Whether these are the whole values of a report: of what was measured beside this base's, or of a base."""
    try:
        return _is_base(report) if base is None else _is_beside(report, base)
    except (ValueError, TypeError, KeyError, AttributeError):
        return False


def _is_base(report: dict[str, Any]) -> bool:
    recall = report["recall"]
    return (
        not {"kl", "dmc", "baseline"} & set(report)
        and _is_measured(report)
        and _holds_losses(report)
        and all(row["samples"] > 0 and (row["correct"] > 0 or not row["counts"]) for row in recall)
        and all(row["accuracy"] == row["correct"] / row["samples"] for row in recall)
    )


def _is_beside(report: dict[str, Any], base: dict[str, Any]) -> bool:
    return (
        _is_measured(report)
        and {name: report[name] for name in ("amount", "text")} == {name: base[name] for name in ("amount", "text")}
        # Versions before this one did not write the base's weights down.
        and report.get("base_weights", base["weights"]) == base["weights"]
        and all(_holds_numbers(row, "compression_ratio", *(f"plain_{x}" for x in _SERVED)) for row in report["serving"])
        and all(not row["counts"] or _holds_numbers(row, "over_base") for row in report["recall"])
        and _is_continued(report)
        and (_is_of_baseline(report) if "baseline" in report else _is_of_model(report))
    )


def _is_of_model(report: dict[str, Any]) -> bool:
    """An export that merges; or a plain model: with fewer KV heads, or the base trained on."""
    return _holds_divergences(report) and ("dmc" not in report or _is_dmc(report["dmc"]))


def _is_of_baseline(report: dict[str, Any]) -> bool:
    """Its settings are words and numbers; losses of whole texts are there if it acts while it reads."""
    settings = report["baseline"].values()
    return (
        "dmc" not in report
        and (not {"loss", "kl", "copying"} & set(report) or _holds_divergences(report))
        and any(map(_is_number, settings))
        and all(_is_name(value) or _is_number(value) for value in settings)
    )


def _is_dmc(dmc: dict[str, Any]) -> bool:
    return _holds_numbers(dmc, "target_compression_ratio", "local_window") and isinstance(dmc["operation"], str)


def _is_continued(report: dict[str, Any]) -> bool:
    """Losses after a context. Of exports that merge, versions before this one did not measure them."""
    if "dmc" in report and "continued" not in report:
        return True
    lengths = tuple(row["tokens"] for row in report["continued"])
    return lengths == Amount.from_dict(report["amount"]).recall_tokens and all(
        _holds_numbers(row, "loss", "kl") for row in report["continued"]
    )


def _holds_divergences(report: dict[str, Any]) -> bool:
    """Losses of whole texts, beside the base's."""
    return (
        _holds_losses(report)
        and _holds_numbers(report, "kl")
        and [_is_number(value) for value in report["kl_by_quarter"]] == QUARTERS * [True]
    )


def _holds_losses(report: dict[str, Any]) -> bool:
    copied = tuple(row["tokens"] for row in report["copying"])
    return (
        _holds_numbers(report, "loss")
        and copied == Amount.from_dict(report["amount"]).copy_tokens
        and all(_holds_numbers(row, "loss") for row in report["copying"])
    )


def _is_measured(report: dict[str, Any]) -> bool:
    amount = Amount.from_dict(report["amount"])
    return (
        all(_is_name(report[name]) for name in ("model", "text", "weights"))
        and report["serving_dtype"] in ("float32", "bfloat16")
        and isinstance(report["machine"], dict)
        and [(row["task"], row["tokens"]) for row in report["recall"]] == amount.recall_parts
        and tuple(row["tokens"] for row in report["serving"]) == amount.serving_tokens
        and all(_holds_numbers(row, *_SERVED) for row in report["serving"])
        and all(_is_recall(row) for row in report["recall"])
    )


def _is_recall(row: dict[str, Any]) -> bool:
    correct, samples = row["correct"], row["samples"]
    return type(correct) is type(samples) is int and 0 <= correct <= samples and isinstance(row["counts"], bool)


def _is_name(value: Any) -> bool:
    """What a message can show as it is: no line breaks, no control codes."""
    if not isinstance(value, str) or any(unicodedata.category(character) == "Cc" for character in value):
        return False
    return 0 < len(value) <= LONGEST_PATH


def _holds_numbers(values: dict[str, Any], *names: str) -> bool:
    return all(_is_number(values[name]) for name in names)


def _is_number(value: Any) -> bool:
    return type(value) in (int, float) and math.isfinite(value)
