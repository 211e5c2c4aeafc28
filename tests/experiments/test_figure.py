"""The quickstart's figure and table show what was measured."""

from typing import Any

import pytest
from rich.console import Console

from megatron_dmc.experiments.quickstart.figure import draw
from megatron_dmc.experiments.quickstart.table import show


@pytest.fixture
def summary() -> dict[str, Any]:
    """As summary.json: three runs of three checkpoints, losses that rise with the ratio."""

    def row(run: str, ratio: int) -> dict[str, Any]:
        return {
            "run": run,
            "checkpoint": f"{run}/final" if ratio == 4 else f"{run}/cr_{ratio}",
            "train": "adapter" if run == "adapter" else "full",
            "loss": 4.0,
            "perplexity": 54.6,
            "loss_per_byte": 1.25 + 0.01 * ratio if run == "adapter" else 1.2 + 0.01 * ratio,
            "target_compression_ratio": float(ratio),
            "compression_ratio": 1.1 * ratio,
            "compression_ratio_of_cache": 1.05 * ratio,
            "cache_bytes": 2**20 // ratio,
            "plain_cache_bytes": 2**20,
            "layer_head_compression_ratio": [[1.5, 3.0], [2.0, 8.0]],
        }

    plain = {"loss": 4.1, "perplexity": 60.0}
    return {
        "base": {"checkpoint": "base/final", "loss_per_byte": 1.25, **plain},
        "control": {"checkpoint": "control/final", "loss_per_byte": 1.2, **plain},
        "dmc": [row(run, ratio) for run in ("recipe", "adapter", "neuron") for ratio in (2, 3, 4)],
        "generation": {name: {"tokens_per_second": 100.0, "text": "a text"} for name in ("dmc", "control")},
    }


def test_a_curve_begins_where_its_run_began(summary: dict[str, Any]) -> None:
    """A frozen base stays above the control, which has been trained on; an adapter's curve begins there."""
    cost = draw(summary).axes[0]
    curves = {line.get_label(): line.get_xydata() for line in cost.lines}
    assert set(curves) == {"projection", "adapter, distilled", "paper's form"}
    for label, points in curves.items():
        assert points[0].tolist() == pytest.approx([1.0, 0.05 if label.startswith("adapter") else 0.0])
    assert curves["adapter, distilled"][1].tolist() == pytest.approx([2.2, 0.07])


def test_the_table_shows_every_model(summary: dict[str, Any]) -> None:
    console = Console(width=130)
    with console.capture() as capture:
        show(summary, console)
    lines = capture.get().splitlines()
    assert len([line for line in lines if line.startswith("│ DMC")]) == 9
    (base,) = [line for line in lines if line.startswith("│ base")]
    assert "1.2500" in base and "+0.0500" in base and "1024 KiB" in base
    assert lines[-1] == "a text"


def test_recall_is_shown_where_it_was_measured(summary: dict[str, Any]) -> None:
    """Results of an older version do not have it."""
    console = Console(width=130)
    with console.capture() as capture:
        show(summary, console)
    assert "recall" not in capture.get()
    for i, row in enumerate((summary["base"], summary["control"], *summary["dmc"])):
        row["recall_loss"] = 0.5 + i
    with console.capture() as capture:
        show(summary, console)
    assert (
        "recall (nats per token on the second copy of a text): base 0.50; control 1.50; projection 4.50; adapter, distilled "
        "7.50; paper's form 10.50"
    ) in " ".join(capture.get().split())


def test_the_table_says_why_the_log_has_other_numbers(summary: dict[str, Any]) -> None:
    console = Console(width=130)
    with console.capture() as capture:
        show(summary, console)
    text = " ".join(capture.get().split())
    assert (
        "The log's numbers differ: its held-out lines read other held-out samples, its other lines training batches."
        in text
    )
    assert "The cache is measured on one text of 2048 tokens." in text
