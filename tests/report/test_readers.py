"""Each kind of run becomes the same kind of rows; what is damaged is named in one line."""

import copy
import json
import os
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from megatron_dmc.report.readers import read_run
from megatron_dmc.report.readers.quickstart import RUNS
from megatron_dmc.report.readers.reports import RECALL
from tests.support.processes import ROOT
from tests.support.runs import comparison, write_quickstart, write_real_model
from tests.support.texts import fails


def test_a_quickstart(tmp_path: Path) -> None:
    run = read_run(write_quickstart(tmp_path / "run"))
    assert [row.method for row in run.rows] == ["base", "control", *(name for name in RUNS for _ in range(3))]
    final = next(row for row in run.rows if row.name == "recipe/final")
    # The README's table.
    assert (f"{final.ratio:.2f}", final.target, f"{final.cache_bytes / 1024:.0f}") == ("4.06", 4.0, "997")
    (loss,) = run.measures
    assert loss.axis == "nats/byte" and f"{final.values[loss]:.4f}" == "1.1865"
    assert len(final.heads) == 4 and run.rows[0].cache_bytes == 4096 * 1024


def test_a_real_model(tmp_path: Path) -> None:
    run = read_run(write_real_model(tmp_path / "run"))
    assert [(row.name, row.method, row.target) for row in run.rows] == [
        ("base", "base", None),
        ("calibrated-cr4", "calibrated", 4.0),
        ("trained-cr4", "trained", 4.0),
        ("calibrated-cr8", "calibrated", 8.0),
        ("trained-cr8", "trained", 8.0),
    ]
    # docs/results.md.
    assert f"{run.rows[2].ratio:.2f}" == "3.86" and run.bytes_tokens == 2000
    assert [measure.title for measure in run.measures] == [
        "recall over the base's",
        "copying, 2,048 tokens",
        "KL, whole texts",
        "loss, whole texts",
    ]
    assert run.rows[0].values[RECALL] == 1.0
    assert [served.tokens for served in run.rows[1].served] == [2000, 8000]
    retrofit, export, evaluation = run.rows[4].commands
    assert retrofit.startswith(
        "megatron-dmc retrofit examples/smollm2/train.yaml checkpoint.directory=checkpoints/trained-cr8"
    )
    assert export.startswith("megatron-dmc convert-to-hf ") and evaluation.startswith(
        "megatron-dmc evaluate hf-trained-cr8 "
    )
    assert ("model", "smollm2") in run.facts and ("vocab size", "49,152") in run.facts


def write(folder: Path, values: Any, name: str = "comparison.json") -> Path:
    folder.mkdir(exist_ok=True)
    (folder / name).write_text(values if isinstance(values, str) else json.dumps(values))
    return folder


def test_a_comparison(tmp_path: Path) -> None:
    run = read_run(write(tmp_path, comparison()))
    rows = {row.name: row for row in run.rows}
    assert rows["dmc-cr4-seed2"].seed == 2 and rows["dmc-cr4-seed2"].ratio == pytest.approx(3.8)
    assert rows["dmc-cr4-seed2"].trained_tokens == 1000 and rows["dmc-cr4-seed2"].training_seconds == 12.5
    # Its report has no ratio: it has the one that it was asked for.
    assert rows["gqa-cr4"].ratio == 4.0 and rows["gqa-cr4"].heads is None
    titles = [measure.title for measure in run.measures]
    assert titles[0] == "KL after a context of 2,000 tokens" and titles[-2:] == [
        "RULER, 1,024 tokens",
        "RULER, 2,048 tokens",
    ]
    by_title = {measure.title: measure for measure in run.measures}
    assert rows["base"].values[by_title[titles[0]]] == 0.0
    # A baseline has no loss of whole texts.
    assert {measure.title for measure in rows["snapkv-cr4"].values} == {
        "KL after a context of 2,000 tokens",
        "loss after a context of 2,000 tokens",
    }
    assert by_title["RULER, 1,024 tokens"].more_is_better and by_title["recall over the base's"].more_is_better


def without(name: str) -> Callable[[dict[str, Any]], Any]:
    return lambda values: values.pop(name)


@pytest.mark.parametrize(
    ("harm", "said"),
    [
        (without("base"), "base is missing"),
        (without("rows"), "rows is missing"),
        (lambda values: values.update(rows={}), "rows is no list of objects"),
        (lambda values: values["rows"][0].update(ratio=float("nan")), "ratio is no number"),
        (lambda values: values["rows"][0].update(ratio=0), "ratio is not above 0"),
        (lambda values: values["rows"][0].update(ratio=True), "ratio is no number"),
        (lambda values: values["rows"][0].update(label=7), "label is no text"),
        (lambda values: values["rows"][0].update(seed=1.5), "seed is no whole number"),
        (lambda values: values["rows"][0].update(commands="x"), "commands is no list of texts"),
        (lambda values: values["rows"][0].update(ruler=[1]), "ruler is no object"),
        (lambda values: values["rows"][0].update(ruler={"long": 1}), "invalid literal for int"),
        (lambda values: values["rows"][0].update(report=None), "report is no object"),
        (lambda values: values["base"]["serving"][0].update(cache_bytes=-1), "cache_bytes is not above 0"),
        (
            lambda values: values["rows"][0]["report"]["serving"][0].update(layer_head_compression_ratio=[[1], [1, 2]]),
            "layer_head_compression_ratio is no table with equal rows",
        ),
        (lambda values: values.update(model=[]), "model is no object"),
        (lambda values: values.update(stages=[{"stage": "a"}]), "command is missing"),
    ],
)
def test_a_damaged_comparison(tmp_path: Path, harm: Callable[[dict[str, Any]], Any], said: str) -> None:
    values = comparison()
    harm(values)
    fails(
        f"comparison.json is damaged.*{said}.*; remove it, and run megatron-dmc compare again",
        read_run,
        write(tmp_path, values),
    )


@pytest.mark.parametrize("text", ["", "{", "[]", "null", "[" * 100_000, '{"a": 1' + "0" * 5000 + "}", '{"rows": [{}]}'])
def test_files_that_hold_something_else(tmp_path: Path, text: str) -> None:
    fails(r"comparison.json is damaged.*run megatron-dmc compare again", read_run, write(tmp_path / "a", text))
    fails(
        r"summary.json is (damaged|no summary).*run megatron-dmc quickstart again",
        read_run,
        write(tmp_path / "b", text, "summary.json"),
    )


def test_damaged_summaries(tmp_path: Path) -> None:
    for name, list_name in (("quickstart", "dmc"), ("smollm2", "models")):
        whole = json.loads((ROOT / "examples" / name / "results.json").read_text())
        for harm in (lambda values: values.pop("base"), lambda values, name=list_name: values[name].append({})):
            values = copy.deepcopy(whole)
            harm(values)
            fails(
                r"summary.json is damaged, \w+ is missing; .*quickstart",
                read_run,
                write(tmp_path, values, "summary.json"),
            )


def test_a_folder_without_a_run(tmp_path: Path) -> None:
    fails("is no folder of a run: it has no comparison.json, no summary.json and no checkpoints", read_run, tmp_path)
    (tmp_path / "checkpoints" / "recipe" / "final").mkdir(parents=True)
    (tmp_path / "checkpoints" / "recipe" / "final" / "dmc.json").touch()
    fails(f"no summary.json yet.* such as {tmp_path}/checkpoints/recipe", read_run, tmp_path)
    # A named pipe would keep a reader waiting.
    os.mkfifo(tmp_path / "comparison.json")
    fails("comparison.json is a named pipe, not a file", read_run, tmp_path)
