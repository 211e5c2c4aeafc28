"""The run's numbers as one file, and as tables in the terminal."""

from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

from rich.console import Console
from rich.table import Table

from megatron_dmc.config import ConfigError
from megatron_dmc.evaluation.exported.evaluate import recall_over_base
from megatron_dmc.evaluation.exported.report import is_report
from megatron_dmc.experiments.real_model.retrofits import Retrofit
from megatron_dmc.experiments.small_run import read_object
from megatron_dmc.experiments.stages import read_stages
from megatron_dmc.report.readers.reports import MODEL

if TYPE_CHECKING:
    from megatron_dmc.experiments.real_model.run import Options

# Its report's name.
BASE = "base"
_MODEL = (*MODEL[1:], "max_position_embeddings")


def summarize(
    folder: Path, evaluation: str, options: "Options", text: dict[str, int], retrofits: Sequence[Retrofit]
) -> dict[str, Any]:
    """All numbers of a run, as plain values.

    Args:
        folder: the run's.
        evaluation: the folder of the reports in it.
        text: tokens of both parts of the text, of a sample, and of all that a retrofit was calibrated and trained on.
        retrofits: those that have been evaluated.

    Returns:
        model, its sizes; options; text; machine; base and models, the reports of ``megatron-dmc evaluate``, each of the
        models with its name, target_compression_ratio and recall_over_base; stages, with command and seconds.
    """
    config = read_object(folder / "hf-base" / "config.json", *_MODEL, remedy=f"remove {folder / 'hf-base'}")
    base = read_measured(folder / evaluation / f"{BASE}.json")
    models = []
    for each in retrofits:
        report = read_retrofit(folder / evaluation / f"{each.name}.json", base)
        models.append(
            {
                "name": each.name,
                **{name: report["dmc"][name] for name in ("target_compression_ratio", "operation", "local_window")},
                **report,
                "recall_over_base": recall_over_base(report),
            }
        )
    return {
        # A folder's own name: where it lies is nobody's business.
        "model": {"name": Path(options.model).name, **{name: config[name] for name in _MODEL}},
        "options": {
            "smoke": options.smoke,
            "full": options.full,
            "tokens": options.tokens,
            "own_text": options.data is not None,
        },
        "text": text,
        "machine": base["machine"],
        "base": base,
        "models": models,
        "stages": read_stages(folder / "stages.json"),
    }


def read_retrofit(path: Path, base: dict[str, Any]) -> dict[str, Any]:
    """A retrofit's report. Raises ConfigError: it is none, or of another base."""
    report = read_measured(path, base)
    if "dmc" not in report:
        raise ConfigError(f"{path} is damaged, or no retrofit's; remove it, and run again")
    return report


def read_measured(path: Path, base: dict[str, Any] | None = None) -> dict[str, Any]:
    """A report of ``megatron-dmc evaluate``: a base's, or of what was measured beside it.

    Raises:
        ConfigError: it is not.
    """
    report = read_object(path)
    if not is_report(report, base):
        beside = "" if base is None else f", or was not measured beside the {BASE}.json that is there now"
        raise ConfigError(f"{path} is damaged{beside}; remove it, and run again")
    return report


LOSS_COLUMNS = ("model", "CR", "loss", "over base", "KL", "KL by quarter", "copying", "recall over base")
SERVING_COLUMNS = (
    *("model", "tokens", "CR", "cache", "plain cache"),
    *("first token", "plain first token", "tokens/s", "plain tokens/s"),
)


def loss_rows(summary: dict[str, Any]) -> list[tuple[str, ...]]:
    """Texts of LOSS_COLUMNS, of the base and of every model."""
    base = summary["base"]
    rows: list[tuple[str, ...]] = [("base", "1", f"{base['loss']:.3f}", "", "", "", _losses(base["copying"]), "")]
    for row in summary["models"]:
        recall = row["recall_over_base"]
        rows.append(
            (
                row["name"],
                f"{row['serving'][0]['compression_ratio']:.2f}",
                f"{row['loss']:.3f}",
                f"{row['loss'] - base['loss']:+.3f}",
                f"{row['kl']:.3f}",
                ", ".join(f"{value:.3f}" for value in row["kl_by_quarter"]),
                _losses(row["copying"]),
                "" if recall is None else f"{100 * recall:.0f} %",
            )
        )
    return rows


def _losses(copying: Sequence[dict[str, Any]]) -> str:
    return ", ".join(f"{each['loss']:.3f}" for each in copying)


def recall_columns(summary: dict[str, Any]) -> tuple[str, ...]:
    return ("task", "tokens", "base", *(row["name"] for row in summary["models"]))


def recall_rows(summary: dict[str, Any]) -> list[tuple[str, ...]]:
    """Right of all samples, by task and length, and their sums; a star where the base cannot do it, so that it does not
    count."""
    rows, models = [], (summary["base"], *summary["models"])
    counts = [base["counts"] for base in summary["base"]["recall"]]
    for number, base in enumerate(summary["base"]["recall"]):
        found = [model["recall"][number] for model in models]
        cells = ["skipped" if not row["samples"] else _share([row]) for row in found]
        rows.append((base["task"] + ("" if base["counts"] else " *"), str(base["tokens"]), *cells))
    sums = [_share([row for row, count in zip(model["recall"], counts, strict=True) if count]) for model in models]
    return [*rows, ("all that count", "", *sums)]


def _share(rows: Sequence[dict[str, Any]]) -> str:
    return f"{sum(row['correct'] for row in rows)}/{sum(row['samples'] for row in rows)}"


def serving_rows(summary: dict[str, Any]) -> list[tuple[str, ...]]:
    """Texts of SERVING_COLUMNS, of every model and length of text."""
    return [
        (
            row["name"],
            str(each["tokens"]),
            f"{each['compression_ratio']:.2f}",
            f"{each['cache_bytes'] / 1e6:.1f} MB",
            f"{each['plain_cache_bytes'] / 1e6:.1f} MB",
            f"{each['seconds_to_first_token']:.2f} s",
            f"{each['plain_seconds_to_first_token']:.2f} s",
            f"{each['tokens_per_second']:.1f}",
            f"{each['plain_tokens_per_second']:.1f}",
        )
        for row in summary["models"]
        for each in row["serving"]
    ]


def show(summary: dict[str, Any], console: Console) -> None:
    """The tables of losses, recall and serving."""
    _print(console, "held-out text, nats per token", LOSS_COLUMNS, loss_rows(summary))
    _print(console, "recall, right answers", recall_columns(summary), recall_rows(summary))
    _print(console, "cache and speed, beside the base in the same process", SERVING_COLUMNS, serving_rows(summary))


def _print(console: Console, title: str, columns: Sequence[str], rows: Sequence[Sequence[str]]) -> None:
    table = Table(title=title)
    for column in columns:
        table.add_column(column, justify="left" if column in ("model", "task") else "right")
    for row in rows:
        table.add_row(*row)
    console.print(table)
