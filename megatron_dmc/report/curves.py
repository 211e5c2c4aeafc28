"""Compression ratios over a training, from TensorBoard's files."""

import logging
from pathlib import Path

from megatron_dmc.report.run import Curve

# What a run logs (training/monitor.py), and what a line is called.
_LINES = {
    "compression_ratio/target": "target",
    "compression_ratio/noise_free": "achieved, training samples",
    "evaluation/compression_ratio": "achieved, held-out text",
}
# Of one line; of more every n-th or so is kept.
_POINTS = 1000
_EVENTS = "events.out.tfevents.*"


def event_folders(root: Path) -> dict[str, Path]:
    """Folders with TensorBoard's files in ``root`` and one level below it, by their names."""
    if not root.is_dir():
        return {}
    folders = [root, *sorted(path for path in root.iterdir() if path.is_dir())]
    return {folder.name: folder for folder in folders if any(folder.glob(_EVENTS))}


def read_curve(name: str, folder: Path) -> Curve | None:
    """What a training logged of its ratio; None where it logged none, such as a base's. What cannot be read is left out."""
    from tensorboard.backend.event_processing.event_accumulator import SCALARS, EventAccumulator

    # It warns of files that were cut short, which is what a killed run leaves.
    logging.getLogger("tensorboard").setLevel(logging.ERROR)
    events = EventAccumulator(str(folder), size_guidance={SCALARS: _POINTS})
    events.Reload()
    there = set(events.Tags()[SCALARS])
    lines = {}
    for tag, line in _LINES.items():
        if tag in there:
            points = events.Scalars(tag)
            lines[line] = [each.step for each in points], [each.value for each in points]
    return Curve(name, lines) if set(lines) - {"target"} else None
