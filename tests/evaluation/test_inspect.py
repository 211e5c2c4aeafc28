"""What ``megatron-dmc inspect`` says of a checkpoint, and of a folder of checkpoints."""

import io
import json
import shutil
from pathlib import Path
from typing import Any

import pytest
import torch
from rich.console import Console

from megatron_dmc.cli import main
from megatron_dmc.errors import shortened
from megatron_dmc.evaluation.cache_size import CacheSize
from megatron_dmc.evaluation.inspect import print_checkpoints, print_table, report
from tests.support.toy import recipe_values, write_recipe, write_text

LR = 5e-3
PHASES = [{"kind": "compress", "steps": 4, "lr": LR}, {"kind": "solidify", "steps": 2, "lr": LR}]


@pytest.fixture(scope="module")
def run(tmp_path_factory: pytest.TempPathFactory, one_process: None) -> Path:
    """A retrofit to CR 3; the model has 256 positions."""
    folder = tmp_path_factory.mktemp("run")
    write_text(folder)
    values = recipe_values(folder, folder, PHASES, target_compression_ratio=3.0)
    assert main(["retrofit", str(write_recipe(folder, values))]) == 0
    return folder / "checkpoints"


def test_reads_as_many_tokens_as_the_model_has_positions(run: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["inspect", str(run / "final"), "--json"]) == 0
    captured = capsys.readouterr()
    assert json.loads(captured.out)["tokens"] == 256
    assert captured.err == "reads 256 tokens, which is all of the model's positions\n"
    assert main(["inspect", str(run / "final"), "--tokens", "200", "--json"]) == 0
    captured = capsys.readouterr()
    assert json.loads(captured.out)["tokens"] == 200 and not captured.err
    # A number that was asked for is not changed.
    assert main(["inspect", str(run / "final"), "--tokens", "2048"]) == 1
    assert "2048 tokens exceed the model's 256 positions; read fewer (--tokens)" in capsys.readouterr().err


def test_shows_the_ratio_that_training_reached(run: Path, capsys: pytest.CaptureFixture[str]) -> None:
    saved = json.loads((run / "cr_2" / "dmc.json").read_text())["compression_ratio"]
    assert main(["inspect", str(run / "cr_2"), "--json"]) == 0
    assert json.loads(capsys.readouterr().out)["saved_at_compression_ratio"] == saved
    assert main(["inspect", str(run / "cr_2")]) == 0
    assert f"({saved:.2f} in training on samples of 33 tokens, target then 2)" in capsys.readouterr().out


def test_lists_a_runs_checkpoints(run: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["inspect", str(run), "--json"]) == 0
    rows = json.loads(capsys.readouterr().out)
    assert [(row["name"], row["kind"], row["step"]) for row in rows] == [
        ("cr_2", "weights", 2),
        ("cr_3", "weights", 4),
        ("final", "weights", 6),
        ("step_00000006", "full", 6),
    ]
    for row in rows:
        assert row["target_compression_ratio"] == 3.0
        saved = json.loads((run / row["name"] / "dmc.json").read_text())["compression_ratio"]
        assert row["compression_ratio"] == saved > 1
    # A kept checkpoint's name is the target that it was saved at; the others' is their step's.
    assert [row["target_at_step"] for row in rows] == [2.0, 3.0, 3.0, 3.0]
    assert main(["inspect", str(run)]) == 0
    table = capsys.readouterr().out
    assert f" {rows[0]['compression_ratio']:.2f} " in next(line for line in table.splitlines() if "cr_2" in line)


def test_a_damaged_checkpoint_is_marked_in_the_list(
    run: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    folder = tmp_path / "checkpoints"
    shutil.copytree(run, folder)
    (folder / "cr_2" / "dmc.json").write_text("{")
    (folder / "cr_3" / "dmc.json").unlink()
    weights = next((folder / "final").glob("*.distcp"))
    weights.write_bytes(weights.read_bytes()[:100])
    reasons = {
        "cr_2": f"{folder / 'cr_2' / 'dmc.json'} is damaged, it is not JSON: ",
        "cr_3": f"{folder / 'cr_3'} is not a checkpoint of megatron_dmc, or not whole: dmc.json is missing",
        "final": f"checkpoint {folder / 'final'} is not whole: {weights.name} is cut short (100 of ",
    }
    assert main(["inspect", str(folder)]) == 1
    captured = capsys.readouterr()
    lines = captured.out.splitlines()
    for name, reason in reasons.items():
        assert any(line.replace("│", " ").split()[:2] == [name, "damaged"] for line in lines)
        assert any(line.startswith(f"{name}: {reason}") for line in lines)
    assert any(line.replace("│", " ").split()[:3] == ["step_00000006", "full", "6"] for line in lines)
    begin = "megatron-dmc: 3 of 4 checkpoints cannot be read, the first: "
    (line,) = captured.err.splitlines()
    assert line.startswith(begin + reasons["cr_2"])

    assert main(["inspect", str(folder), "--json"]) == 1
    rows = json.loads(capsys.readouterr().out)
    assert [row["name"] for row in rows] == ["step_00000006", *reasons]
    for row in rows[1:]:
        assert set(row) == {"name", "damaged"} and row["damaged"].startswith(reasons[row["name"]])


@pytest.mark.parametrize("ratio", ["a", -2.0, True, float("nan"), pytest.param(10**400, id="10^400"), [2]])
def test_a_ratio_that_is_none_is_damage(
    run: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str], ratio: Any
) -> None:
    shutil.copytree(run / "cr_2", tmp_path / "cr_2")
    path = tmp_path / "cr_2" / "dmc.json"
    path.write_text(json.dumps(json.loads(path.read_text()) | {"compression_ratio": ratio}))
    assert main(["inspect", str(tmp_path)]) == 1
    assert (
        f"{path} has compression_ratio {shortened(repr(ratio))}, it must be a number > 0, or null"
        in capsys.readouterr().err
    )


def test_a_recipe_that_cannot_be_read_is_damage(run: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    shutil.copytree(run / "cr_2", tmp_path / "cr_2")
    path = tmp_path / "cr_2" / "dmc.json"
    values = json.loads(path.read_text())
    values["recipe"]["phases"] = None
    path.write_text(json.dumps(values))
    assert main(["inspect", str(tmp_path)]) == 1
    assert f"{path} is damaged, its recipe cannot be read: phases must be a list" in capsys.readouterr().err


def test_names_are_shown_as_they_are(run: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """A name in brackets would be a style of the table's."""
    folder = tmp_path / "m[bold]"
    shutil.copytree(run / "cr_2", folder / "[red]cr[x]")
    assert main(["inspect", str(folder)]) == 0
    shown = capsys.readouterr().out
    assert "m[bold]" in shown and "[red]cr[x]" in shown
    assert main(["inspect", str(folder / "[red]cr[x]")]) == 0
    assert "[red]cr[x]: tokens per cache slot" in capsys.readouterr().out


def test_folders_of_checkpoints_are_named(run: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """The quickstart's runs lie in one folder."""
    for name in ("second", "first"):
        shutil.copytree(run / "cr_2", tmp_path / "checkpoints" / name / "cr_2")
    several = tmp_path / "checkpoints"
    for folder in (several, tmp_path):
        assert main(["inspect", str(folder)]) == 1
        line = f"{several} holds folders of checkpoints (first, second); name one, such as {several / 'first'}"
        assert capsys.readouterr().err == f"megatron-dmc: {line}\n"


def test_a_pipe_gets_whole_lines(run: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    folder = tmp_path / ("long" * 40)
    folder.mkdir()
    name = "a_name_that_is_longer_than_a_terminal_is_wide_" * 4
    shutil.copytree(run / "cr_2", folder / name)
    assert main(["inspect", str(folder)]) == 0
    row = next(line for line in capsys.readouterr().out.splitlines() if "a_name" in line)
    assert f"│ {name} │ weights " in row
    # One column for every head, as many as there are.
    measured = CacheSize(64, torch.full((1, 40), 32), 256, 1024)
    print_table(measured, "final")
    table = [line for line in capsys.readouterr().out.splitlines() if line.startswith("│")]
    assert len(table) == 1 and table[0].count("│") == 43


def size(slots: list[list[int]], tokens: int, window: int) -> CacheSize:
    return CacheSize(tokens, torch.tensor(slots), 512, 1024, window)


def test_the_residual_slot_is_no_token_that_a_layer_kept() -> None:
    """100 decisions, one token kept without one, a window of 10, and the slot that all were absorbed into."""
    slots = torch.tensor([[12, 12], [62, 62]])
    assert CacheSize(111, slots, 512, 1024, 10, residual=1).layers_that_merge_everything == [0]


@pytest.mark.parametrize(
    ("slots", "tokens", "window", "flagged"),
    [
        # Beyond the first token and the window each head decides on 1000 tokens.
        ([[17 + 500, 17 + 250], [17, 17]], 1017, 16, [1]),
        ([[17 + 9, 17 + 9], [17 + 10, 17 + 10]], 1017, 16, [0]),
        # One head that gives up is made good by the other.
        ([[17, 17 + 500]], 1017, 16, []),
        ([[1, 1], [5, 5], [500, 500]], 501, 0, [0, 1]),
        # Too few decisions to tell.
        ([[17, 17]], 116, 16, []),
        ([[17, 17]], 117, 16, [0]),
        ([[16, 16]], 16, 16, []),
        ([[16, 16]], 16, 64, []),
    ],
)
def test_layers_that_merge_everything(slots: list[list[int]], tokens: int, window: int, flagged: list[int]) -> None:
    measured = size(slots, tokens, window)
    assert measured.layers_that_merge_everything == flagged
    assert report(measured)["layers_that_merge_everything"] == flagged
    text = io.StringIO()
    print_table(measured, "final", Console(file=text, width=100))
    marked = [line for line in text.getvalue().splitlines() if line.startswith("│") and "!" in line]
    assert len(marked) == len(flagged)
    assert ("nearly every token" in text.getvalue()) == bool(flagged)


def test_a_layers_ratio_counts_its_heads_slots() -> None:
    assert size([[100, 300], [50, 50]], 400, 0).layer_ratio.tolist() == [2.0, 8.0]


@pytest.mark.parametrize(
    ("cache_bytes", "words"),
    [
        (256, "75% saved"),
        (1024, "0% saved"),
        # The cache holds whole pages and sums of its open slots: where little merges it is larger.
        (1056, "3% more than without DMC (too little merges to pay for the pages)"),
    ],
)
def test_says_what_the_cache_costs_in_words(cache_bytes: int, words: str) -> None:
    text = io.StringIO()
    print_table(CacheSize(64, torch.full((1, 2), 64), cache_bytes, 1024), "final", Console(file=text, width=200))
    assert text.getvalue().splitlines()[-1].endswith(f"plain 1 KiB: {words}")


def test_a_kept_checkpoint_below_its_name_is_marked() -> None:
    """``cr_4`` is saved when the target passes 4, whatever the model has reached by then."""
    row = {"kind": "weights", "step": 38, "target_compression_ratio": 8.0}
    rows = [
        {**row, "name": "cr_2", "compression_ratio": 1.95, "target_at_step": 2.0},
        {**row, "name": "cr_4", "compression_ratio": 1.0, "target_at_step": 4.0},
        {**row, "name": "base", "compression_ratio": None, "target_at_step": None},
    ]
    text = io.StringIO()
    print_checkpoints(rows, "run", Console(file=text, width=120))
    cells = {line.split()[1]: line.replace("│", " ").split() for line in text.getvalue().splitlines() if "38" in line}
    assert cells["cr_2"] == ["cr_2", "weights", "38", "2", "1.95", "8"]
    assert cells["cr_4"] == ["cr_4", "weights", "38", "4", "!", "1.00", "8"]
    assert cells["base"] == ["base", "weights", "38", "-", "-", "8"]
    note = " ".join(text.getvalue().split("┘")[-1].split())
    assert note == (
        "! saved below its target: cr_N is saved when the schedule's target passes N, not when the model's ratio reaches it"
    )


def test_nothing_is_marked_where_every_target_was_reached() -> None:
    row = {"name": "cr_2", "kind": "weights", "step": 9, "target_compression_ratio": 8.0, "target_at_step": 2.0}
    text = io.StringIO()
    print_checkpoints([{**row, "compression_ratio": 2.3}], "run", Console(file=text, width=120))
    assert "!" not in text.getvalue()


@pytest.mark.parametrize(("target", "warned"), [(1.05, False), (2.0, True), (None, False)])
def test_a_ratio_below_the_target_it_was_saved_at_is_named(target: float | None, warned: bool) -> None:
    text = io.StringIO()
    measured = CacheSize(64, torch.full((1, 2), 64), 1024, 1024)
    print_table(measured, "cr_2", Console(file=text, width=200), saved_at=1.0, target=target)
    line = "! saved below its target: the schedule asked for 2 at that step, the ratio was 1.00"
    assert (line in text.getvalue()) == warned
