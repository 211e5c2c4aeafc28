"""The whole job on a small model and real text: pretrain, retrofit, compare, export, generate.

Every stage between the text and the figure is a command that a user could type in the run's folder, and is printed as one. A
stage that is done is not done again.
"""

import json
import os
import shlex
from pathlib import Path

from rich.console import Console

from megatron_dmc.experiments.quickstart import figure
from megatron_dmc.experiments.quickstart.table import show
from megatron_dmc.experiments.small_run import SmallRun


def run_quickstart(folder: Path, data: str | None, smoke: bool) -> None:
    """Runs all stages in ``folder`` and prints the table. See :class:`SmallRun` for the arguments.

    Raises:
        ConfigError: bad text, or a folder with a run on other text.
        CommandFailed: a stage did not finish; its process has said why.
    """
    quickstart = SmallRun(folder, data, smoke)
    quickstart.prepare_text()
    for name in ("base", "control", "recipe", "adapter", "neuron"):
        quickstart.stage(f"training: {name}.yaml", f"checkpoints/{name}/final", quickstart.training(name))
    for name, exported in (("recipe", "hf"), ("control", "hf-control")):
        convert = ["convert-to-hf", f"checkpoints/{name}/final", exported]
        quickstart.stage(f"export to Hugging Face: {exported}", exported, convert)
    quickstart.stage("evaluation", "summary.json", ["quickstart-evaluate", *["--smoke"] * smoke])
    summary, image = quickstart.folder / "summary.json", quickstart.folder / "figure.png"
    if not image.exists():
        quickstart.timed("figure", lambda: figure.save(summary, image))
    show(json.loads(summary.read_text()), Console(width=130))
    quickstart.make_page()
    spent = quickstart.seconds
    total = ", ".join(f"{name} {seconds:.0f} s" for name, seconds in spent.items())
    print(f"{sum(spent.values()):.0f} s: {total}" if total else "every stage was done before")
    meaning = "; at toy size the numbers, the warnings and the text mean nothing" if smoke else ""
    results = os.path.relpath(quickstart.folder)
    print(f"results: {results} (hf, summary.json, figure.png, tensorboard){meaning}")
    print(f"next: megatron-dmc inspect {shlex.quote(os.path.join(results, 'checkpoints', 'recipe'))}")
