"""The folder of ``megatron-dmc quickstart --model``."""

from pathlib import Path
from typing import Any

from megatron_dmc.report.curves import event_folders
from megatron_dmc.report.readers.reports import add_report, bytes_tokens, exports, facts_of
from megatron_dmc.report.readers.stages import read_stages, trainings
from megatron_dmc.report.readers.values import an_object, number, objects, optional, positive, taken_from, text
from megatron_dmc.report.run import Row, Run, Stage

REMEDY = "run megatron-dmc quickstart --model again, which writes it anew"
_LABELS = {"trained": "DMC, trained", "calibrated": "DMC, calibrated only"}


def read(path: Path, summary: dict[str, Any]) -> Run:
    """Raises ConfigError where the summary, read from ``path``, is damaged."""
    folder = path.parent
    with taken_from(path, REMEDY):
        stages, base = read_stages(summary), an_object(summary, "base")
        plain = Row("base", "base", "base", 1.0, commands=_commands(stages, "base"))
        rows = [add_report(plain, base, 1.0)]
        for report in objects(summary, "models"):
            row = _row(report, stages)
            rows.append(add_report(row, report, optional(number, report, "recall_over_base")))
        return Run(
            folder,
            "a retrofit of a real model, and what it has kept",
            rows=rows,
            facts=facts_of(summary),
            stages=stages,
            bytes_tokens=bytes_tokens(base),
            curves=event_folders(folder / "tensorboard"),
            training=trainings(stages),
            # The last one is the trained one with the highest ratio.
            models=exports(folder, [row.name for row in reversed(rows)]),
            text=[folder / "data" / "text_valid"],
        )


def _row(report: dict[str, Any], stages: list[Stage]) -> Row:
    name, target = text(report, "name"), positive(report, "target_compression_ratio")
    method = name.rpartition("-cr")[0] or name
    return Row(name, method, _LABELS.get(method, method), target, target=target, commands=_commands(stages, name))


def _commands(stages: list[Stage], name: str) -> list[str]:
    return [stage.command for stage in stages if stage.command and stage.title.endswith(f": {name}")]
