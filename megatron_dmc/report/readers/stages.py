"""The stages of a run, as its summary tells them."""

from collections.abc import Sequence
from typing import Any

from megatron_dmc.report.readers.values import number, objects, text
from megatron_dmc.report.run import Stage


def trainings(stages: Sequence[Stage]) -> list[str]:
    """Commands of the stages that train."""
    return [stage.command for stage in stages if stage.command.startswith("megatron-dmc retrofit ")]


def read_stages(values: dict[str, Any]) -> list[Stage]:
    """None where there are none. Raises KeyError, ValueError for damaged ones."""
    found = objects(values, "stages") if "stages" in values else []
    return [Stage(text(row, "stage"), text(row, "command"), number(row, "seconds")) for row in found]
