"""Checkpoints: what is saved comes back, what is not whole or of another model is named in one line."""

import json
import os
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from megatron.core.dist_checkpointing.mapping import ShardedTensor

from megatron_dmc.checkpoint import (
    CheckpointError,
    CheckpointInfo,
    SavedModel,
    prune,
    read_latest,
    save_checkpoint,
    update_latest,
)
from tests.support.checkpoints import INFO, MODEL, RECIPE, hidden, state

pytestmark = pytest.mark.usefixtures("one_process")


def test_roundtrip(tmp_path: Path) -> None:
    tokenizer = tmp_path / "tokenizer"
    tokenizer.mkdir()
    (tokenizer / "tokenizer.json").write_text("{}")
    (tokenizer / "model.safetensors").write_text("large")
    folder = save_checkpoint(tmp_path / "run", "step_00000003", state(3.0), INFO, tokenizer)
    assert SavedModel.open(folder).info == INFO
    assert [path.name for path in (folder / "tokenizer").iterdir()] == ["tokenizer.json"]
    assert hidden(tmp_path / "run") == []
    assert str(tmp_path).encode() not in (folder / ".metadata").read_bytes()

    loaded = SavedModel.open(folder).load(state(), expected_model=MODEL)
    expected = state(3.0)
    assert loaded["step"] == 3 and loaded["nested"] == {"lr": 3.0}
    assert loaded["model"]["object"] == {"gate": 3.0, "ids": [1, 2]}
    for name in ("weight", "half", "count"):
        assert torch.equal(loaded["model"][name], expected["model"][name].data)
        assert loaded["model"][name].dtype == expected["model"][name].dtype


def test_overwriting_a_name_replaces_it(saved: Path) -> None:
    save_checkpoint(saved.parent, saved.name, state(5.0), INFO)
    assert SavedModel.open(saved).load(state())["step"] == 5
    assert hidden(saved.parent) == []


def test_a_failed_overwrite_leaves_the_old_one(saved: Path) -> None:
    broken = state(5.0)
    broken["nested"]["function"] = time.sleep  # the weights-only loader would refuse it at the next resume
    with pytest.raises(CheckpointError, match=r"cannot save .*time\.sleep.*plain values and tensors") as raised:
        save_checkpoint(saved.parent, saved.name, broken, INFO)
    assert "\n" not in str(raised.value)
    assert SavedModel.open(saved).load(state())["step"] == 3
    assert hidden(saved.parent) == []


def test_a_replacement_killed_between_its_renames_is_undone(saved: Path) -> None:
    update_latest(saved.parent, saved.name)
    saved.rename(saved.with_name(f".{saved.name}.old"))
    assert read_latest(saved.parent) == saved.name
    assert SavedModel.open(saved).load(state())["step"] == 3


def test_latest(saved: Path) -> None:
    root = saved.parent
    assert read_latest(root) is None
    update_latest(root, saved.name)
    assert read_latest(root) == saved.name
    with pytest.raises(CheckpointError, match="not a whole checkpoint"):
        update_latest(root, "step_00000009")
    assert read_latest(root) == saved.name
    (root / "latest").write_text("../elsewhere")
    with pytest.raises(CheckpointError, match="must hold the name"):
        read_latest(root)


def test_prune_keeps_latest_and_whatever_is_not_a_full_checkpoint(tmp_path: Path) -> None:
    weights = CheckpointInfo(kind="weights", recipe=RECIPE, step=0, consumed_samples=0, phase=0)
    for step in (1, 2, 3, 10):
        save_checkpoint(tmp_path, f"step_{step}", state(), INFO)
    save_checkpoint(tmp_path, "cr_2", state(), weights)
    (tmp_path / "step_0").mkdir()
    update_latest(tmp_path, "step_1")
    assert prune(tmp_path, keep_last=1) == []
    update_latest(tmp_path, "step_10")
    assert prune(tmp_path, keep_last=3) == ["step_1"]
    update_latest(tmp_path, "step_3")
    # A newer one belongs to a run that was given up: it is neither removed nor counted.
    assert prune(tmp_path, keep_last=1) == ["step_2"]
    assert sorted(path.name for path in tmp_path.iterdir()) == [
        "cr_2",
        "latest",
        "step_0",
        "step_10",
        "step_3",
    ]


def test_a_checkpoint_that_is_a_link_is_replaced_and_pruned(saved: Path, tmp_path: Path) -> None:
    for value in (5.0, 6.0):
        saved.symlink_to(saved.rename(tmp_path / f"moved_{value}"))
        save_checkpoint(saved.parent, saved.name, state(value), INFO)
        assert not saved.is_symlink() and SavedModel.open(saved).load(state())["step"] == value
        assert hidden(saved.parent) == []
    saved.symlink_to(saved.rename(tmp_path / "moved"))
    save_checkpoint(saved.parent, "step_4", state(), INFO)
    update_latest(saved.parent, "step_4")
    assert prune(saved.parent, keep_last=1) == [saved.name]
    assert not saved.is_symlink() and hidden(saved.parent) == []
    assert SavedModel.open(tmp_path / "moved").load(state())["step"] == 6


@pytest.mark.parametrize("name", ["metadata.json", ".metadata", "common.pt", "dmc.json", "__0_0.distcp"])
def test_a_missing_file_is_named(saved: Path, name: str) -> None:
    (saved / name).unlink()
    with pytest.raises(CheckpointError, match=rf"not whole.*{name} is missing"):
        SavedModel.open(saved)
    with pytest.raises(CheckpointError, match=rf"not whole.*{name} is missing"):
        SavedModel.open(saved).load(state())


@pytest.mark.parametrize("name", ["metadata.json", ".metadata", "common.pt", "dmc.json", "__0_0.distcp"])
@pytest.mark.parametrize("kept", [0.0, 0.5, 0.99])
def test_a_truncated_file_is_named_in_one_line(saved: Path, name: str, kept: float) -> None:
    data = (saved / name).read_bytes()
    (saved / name).write_bytes(data[: int(kept * len(data))])
    with pytest.raises(CheckpointError, match=name) as raised:
        SavedModel.open(saved)
    assert "\n" not in str(raised.value)


def test_a_folder_that_is_absent_is_named(tmp_path: Path) -> None:
    with pytest.raises(CheckpointError, match=r"step_7 does not exist"):
        SavedModel.open(tmp_path / "step_7")


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"format_version": 2}, "format_version 2"),
        ({"recipe": None}, "no recipe"),
        ({"kind": "half"}, "kind 'half'"),
        ({"step": "many"}, "step 'many'"),
        ({"color": "red"}, "color"),
        ({"datasets": ["text"]}, r"datasets \['text'\]"),
        (
            {"vocabulary": 301},
            r"vocabulary 301, it must be an integer from 1 to the model's vocab_size \(300\), or null",
        ),
        ({"vocabulary": 0}, "vocabulary 0"),
        ({"vocabulary": True}, "vocabulary True"),
    ],
)
def test_a_description_of_another_kind_is_refused(saved: Path, change: dict[str, Any], message: str) -> None:
    values = json.loads((saved / "dmc.json").read_text())
    (saved / "dmc.json").write_text(json.dumps({**values, **change}))
    with pytest.raises(CheckpointError, match=message):
        SavedModel.open(saved)


def test_damaged_data_is_one_line(saved: Path) -> None:
    data = (saved / "__0_0.distcp").read_bytes()
    (saved / "__0_0.distcp").write_bytes(bytes(len(data)))
    with pytest.raises(CheckpointError, match="cannot load") as raised:
        SavedModel.open(saved).load(state())
    assert "\n" not in str(raised.value)


def test_another_model_is_recognized_by_its_settings(saved: Path) -> None:
    expected = {**MODEL, "num_layers": 6, "num_query_groups": 2, "max_position_embeddings": 9}
    with pytest.raises(CheckpointError, match=r"num_layers is 2 there, 6 here; model\.num_query_groups is 1 there"):
        SavedModel.open(saved).load(state(), expected_model=expected)
    SavedModel.open(saved).load(state(), expected_model={**MODEL, "kv_channels": 8, "init_method_std": 0.1})


def test_another_model_is_recognized_by_its_tensors(saved: Path) -> None:
    with pytest.raises(CheckpointError, match=r"another model's: weight has shape \[4, 3\] there, \[5, 3\] here"):
        SavedModel.open(saved).load(state(rows=5))
    wanted = state()
    wanted["model"]["bias"] = ShardedTensor.from_rank_offsets("bias", torch.zeros(2), replica_id=0)
    with pytest.raises(CheckpointError, match="bias is missing in the checkpoint"):
        SavedModel.open(saved).load(wanted)


def test_what_may_be_missing_is_left_out(saved: Path) -> None:
    wanted = state()
    wanted["model"]["decision"] = ShardedTensor.from_rank_offsets("decision", torch.ones(2), replica_id=0)
    loaded = SavedModel.open(saved).load(wanted, may_be_missing=lambda key: key == "decision")
    assert "decision" not in loaded["model"]
    assert torch.equal(loaded["model"]["weight"], torch.full((4, 3), 3.0))


def test_less_than_everything_can_be_asked_for(saved: Path) -> None:
    wanted = state()
    del wanted["model"]["count"], wanted["model"]["object"]
    assert set(SavedModel.open(saved).load(wanted)["model"]) == {"weight", "half"}


def test_only_leftovers_of_checkpoints_are_removed(saved: Path) -> None:
    root = saved.parent
    leftovers = [f".{saved.name}.tmp-0123abcd", ".cr_4.tmp-deleted", ".final.old"]
    foreign = [".data.old", ".venv.tmp-2026", ".final.tmp-mine", ".final.older", ".step.old", ".notes.tmp-deleted"]
    (root / "data").mkdir()
    for name in (*leftovers, *foreign):
        (root / name).mkdir()
        (root / name / "thesis.txt").touch()
    save_checkpoint(root, "step_9", state(), INFO)
    assert sorted(hidden(root)) == sorted(foreign) and all((root / name / "thesis.txt").exists() for name in foreign)


@pytest.mark.parametrize(
    ("make", "problem"),
    [(os.mkfifo, "is a named pipe, not a file"), (os.mkdir, "is a folder, not a file")],
    ids=["pipe", "folder"],
)
def test_a_latest_that_is_no_file(tmp_path: Path, make: Callable[[Path], None], problem: str) -> None:
    """It is not waited for."""
    make(tmp_path / "latest")
    with pytest.raises(CheckpointError, match=f"latest {problem}; write the name of"):
        read_latest(tmp_path)
