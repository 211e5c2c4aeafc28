"""Which kind of run a folder holds."""

from pathlib import Path

from megatron_dmc.config import ConfigError
from megatron_dmc.report.readers import checkpoints, comparison, quickstart, real_model
from megatron_dmc.report.readers.values import read_object
from megatron_dmc.report.run import Run

SUMMARY = "summary.json"


def read_run(folder: Path) -> Run:
    """Reads the small files of a run, and no model.

    Args:
        folder: exists.

    Raises:
        ConfigError: it holds no run, or one of its files is damaged.
    """
    if (path := folder / comparison.FILE).exists():
        return comparison.read(path, read_object(path, comparison.REMEDY))
    if (path := folder / SUMMARY).exists():
        summary = read_object(path, "remove it, and run megatron-dmc quickstart again")
        if "models" in summary:
            return real_model.read(path, summary)
        if "dmc" in summary:
            return quickstart.read(path, summary)
        raise ConfigError(f"{path} is no summary of a run; remove it, and run megatron-dmc quickstart again")
    if (found := checkpoints.folder_of_checkpoints(folder)) is not None:
        return checkpoints.read(folder, found)
    if several := sorted((folder / "checkpoints").glob("*/*/dmc.json")):
        raise ConfigError(
            f"{folder} has no {SUMMARY} yet; wait until the run has ended, or name the checkpoints of one training, such as "
            f"{several[0].parents[1]}"
        )
    raise ConfigError(
        f"{folder} is no folder of a run: it has no {comparison.FILE}, no {SUMMARY} and no checkpoints; name a run's folder, "
        "such as runs/quickstart"
    )
