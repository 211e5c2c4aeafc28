"""Checkpoints: whole or absent, whatever happens while saving; nothing from a file is run while loading."""

import contextlib
import json
import os
import pickle
import resource
import signal
import subprocess
import sys
import threading
import time
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.distributed as dist
from megatron.core.dist_checkpointing.mapping import ShardedObject, ShardedTensor
from torch.distributed.checkpoint.metadata import MetadataIndex

from megatron_dmc.checkpoint import (
    CheckpointError,
    CheckpointInfo,
    SavedModel,
    prune,
    publish,
    read_latest,
    save_checkpoint,
    update_latest,
)
from megatron_dmc.checkpoint.background import BackgroundWriter
from megatron_dmc.checkpoint.save import StagedCheckpoint, stage_checkpoint, write_checkpoint
from megatron_dmc.convert.from_hf import placeholder_recipe
from megatron_dmc.distributed import cpu
from megatron_dmc.model.model_config import ModelConfig

pytestmark = pytest.mark.usefixtures("one_process")

REPOSITORY = Path(__file__).parents[2]
SIZES = ModelConfig(
    num_layers=2,
    hidden_size=8,
    ffn_hidden_size=16,
    num_attention_heads=2,
    num_query_groups=1,
    vocab_size=300,
    max_position_embeddings=64,
)
RECIPE = placeholder_recipe(SIZES, None).to_dict()
MODEL = RECIPE["model"]
INFO = CheckpointInfo(kind="full", recipe=RECIPE, step=3, consumed_samples=24, phase=0, compression_ratio=1.5)


def state(value: float = 0.0, rows: int = 4) -> dict[str, Any]:
    """One tensor of every dtype that training keeps, an object of plain values, and two plain values."""
    tensors = {
        "weight": torch.full((rows, 3), value),
        "half": torch.full((5,), value, dtype=torch.bfloat16),
        "count": torch.full((2,), int(value), dtype=torch.int64),
    }
    model: dict[str, Any] = {
        name: ShardedTensor.from_rank_offsets(name, tensor, replica_id=0) for name, tensor in tensors.items()
    }
    model["object"] = ShardedObject("object", {"gate": value, "ids": [1, 2]}, (1,), (0,), replica_id=0)
    return {"model": model, "step": int(value), "nested": {"lr": value}}


def hidden(root: Path) -> list[str]:
    return sorted(path.name for path in root.iterdir() if path.name.startswith("."))


def join_group(folder: Path, rank: int, world_size: int) -> None:
    dist.init_process_group(
        "gloo", store=dist.FileStore(str(folder / "store"), world_size), rank=rank, world_size=world_size
    )


@pytest.fixture
def saved(tmp_path: Path) -> Path:
    """The folder of one whole checkpoint."""
    return save_checkpoint(tmp_path, "step_00000003", state(3.0), INFO)


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
    # What is newer belongs to a run that was given up: it neither goes nor counts.
    assert prune(tmp_path, keep_last=1) == ["step_2"]
    assert sorted(path.name for path in tmp_path.iterdir()) == [
        "cr_2",
        "latest",
        "step_0",
        "step_10",
        "step_3",
    ]


def test_a_checkpoint_moved_behind_a_link_is_replaced_and_pruned(saved: Path, tmp_path: Path) -> None:
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
    ],
)
def test_a_description_of_another_kind_is_refused(saved: Path, change: dict[str, Any], message: str) -> None:
    values = json.loads((saved / "dmc.json").read_text())
    (saved / "dmc.json").write_text(json.dumps({**values, **change}))
    with pytest.raises(CheckpointError, match=message):
        SavedModel.open(saved)


class Attack:
    """Runs ``touch FILE`` when it is unpickled freely."""

    def __init__(self, file: Path) -> None:
        self.file = file

    def __reduce__(self) -> tuple[Any, ...]:
        return os.system, (f"touch {self.file}",)


def attacks_on_metadata(witness: Path) -> dict[str, bytes]:
    command = f"touch {witness}".encode()
    dotted = b"torch.distributed.checkpoint.metadata"
    return {
        "protocol 0": pickle.dumps(Attack(witness), protocol=0),
        "protocol 2": pickle.dumps(Attack(witness), protocol=2),
        "protocol 5": pickle.dumps(Attack(witness), protocol=5),
        "the INST opcode": b"(S'" + command + b"'\nios\nsystem\n.",
        "a dotted path from an allowed module": (
            b"\x80\x04\x8c" + bytes([len(dotted)]) + dotted + b"\x8c\x09os.system\x93\x8c"
            + bytes([len(command)]) + command + b"\x85R."
        ),
        "names fetched from the memo": (
            b"\x80\x04\x8c\x05posix\x94\x8c\x06system\x94h\x00h\x01\x93\x8c" + bytes([len(command)]) + command + b"\x85R."
        ),
    }  # fmt: skip


@pytest.mark.parametrize("attack", attacks_on_metadata(Path("unused")))
def test_metadata_that_would_run_code_is_refused(saved: Path, tmp_path: Path, attack: str) -> None:
    witness = tmp_path / "witness"
    data = attacks_on_metadata(witness)[attack]
    with contextlib.suppress(Exception):  # the attack itself works, or the test would say nothing
        pickle.loads(data)
    assert witness.exists() or "dotted" in attack
    witness.unlink(missing_ok=True)

    (saved / ".metadata").write_bytes(data)
    for refused in (lambda: SavedModel.open(saved), lambda: SavedModel.open(saved).load(state())):
        with pytest.raises(CheckpointError, match=r"\.metadata (asks to load|holds the pickle opcode|is damaged)"):
            refused()
    assert not witness.exists()


def test_metadata_may_not_change_what_outlives_it(saved: Path) -> None:
    index = b"\x80\x04ctorch.distributed.checkpoint.metadata\nMetadataIndex\n"
    # BUILD with (None, {"polluted": None}) calls setattr on whatever lies below, here a class.
    attack = index + b"N}\x8c\x08pollutedNs\x86b."
    pickle.loads(attack)
    assert hasattr(MetadataIndex, "polluted")
    del MetadataIndex.polluted
    (saved / ".metadata").write_bytes(attack)
    with pytest.raises(CheckpointError, match=r"\.metadata asks to change <class .*MetadataIndex"):
        SavedModel.open(saved)
    assert not hasattr(MetadataIndex, "polluted")


def test_metadata_may_not_name_files_elsewhere(saved: Path) -> None:
    metadata = pickle.loads((saved / ".metadata").read_bytes())
    for place in metadata.storage_data.values():
        place.relative_path = f"../{saved.name}/{place.relative_path}"
    (saved / ".metadata").write_bytes(pickle.dumps(metadata))
    with pytest.raises(CheckpointError, match="does not describe"):
        SavedModel.open(saved)


def test_plain_values_that_would_run_code_are_refused(saved: Path, tmp_path: Path) -> None:
    torch.save({"step": Attack(tmp_path / "witness")}, saved / "common.pt")
    with pytest.raises(CheckpointError, match=r"common\.pt.*posix\.system"):
        SavedModel.open(saved).load(state())
    assert not (tmp_path / "witness").exists()


def test_objects_that_would_run_code_are_refused(saved: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("TORCH_FORCE_NO_WEIGHTS_ONLY_LOAD", "1")  # even where the user has weakened torch
    metadata = pickle.loads((saved / ".metadata").read_bytes())
    place = next(place for index, place in metadata.storage_data.items() if index.fqn.startswith("object"))
    data = bytearray((saved / place.relative_path).read_bytes())
    torch.save([Attack(tmp_path / "witness")], tmp_path / "object")
    attack = (tmp_path / "object").read_bytes()
    place.offset, place.length = len(data), len(attack)
    (saved / place.relative_path).write_bytes(bytes(data) + attack)
    (saved / ".metadata").write_bytes(pickle.dumps(metadata))
    SavedModel.open(saved)
    with pytest.raises(CheckpointError, match=r"cannot load .*posix\.system") as raised:
        SavedModel.open(saved).load(state())
    assert "\n" not in str(raised.value)
    assert not (tmp_path / "witness").exists()
    assert os.environ["TORCH_FORCE_NO_WEIGHTS_ONLY_LOAD"] == "1"
    assert "TORCH_FORCE_WEIGHTS_ONLY_LOAD" not in os.environ


def test_damaged_data_is_one_line(saved: Path) -> None:
    data = (saved / "__0_0.distcp").read_bytes()
    (saved / "__0_0.distcp").write_bytes(bytes(len(data)))
    with pytest.raises(CheckpointError, match="cannot load") as raised:
        SavedModel.open(saved).load(state())
    assert "\n" not in str(raised.value)


def test_another_model_is_told_by_its_settings(saved: Path) -> None:
    expected = {**MODEL, "num_layers": 6, "num_query_groups": 2, "max_position_embeddings": 9}
    with pytest.raises(CheckpointError, match=r"num_layers is 2 there, 6 here; model\.num_query_groups is 1 there"):
        SavedModel.open(saved).load(state(), expected_model=expected)
    SavedModel.open(saved).load(state(), expected_model={**MODEL, "kv_channels": 4, "init_method_std": 0.1})


def test_another_model_is_told_by_its_tensors(saved: Path) -> None:
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


@pytest.mark.skipif(os.geteuid() != 0, reason="mounting a small disk needs root")
@pytest.mark.parametrize("size", [100_000, 1_040_000, 2_000_000], ids=["fits", "nearly fits", "too large"])
def test_full_disk(tmp_path: Path, size: int) -> None:
    disk = tmp_path / "disk"
    disk.mkdir()
    if subprocess.run(["mount", "-t", "tmpfs", "-o", "size=1m", "none", disk], capture_output=True).returncode:
        pytest.skip("tmpfs cannot be mounted here")
    try:
        save_checkpoint(disk, "step_1", state(1.0), INFO)
        update_latest(disk, "step_1")
        large = state(2.0)
        large["model"]["large"] = ShardedTensor.from_rank_offsets("large", torch.zeros(size // 4), replica_id=0)
        if size == 100_000:
            save_checkpoint(disk, "step_2", large, INFO)
            return
        with pytest.raises(
            CheckpointError, match=r"cannot save .*step_2: .*(needs|needed).*free.* untouched"
        ) as raised:
            save_checkpoint(disk, "step_2", large, INFO)
        assert "\n" not in str(raised.value)
        assert hidden(disk) == [] and not (disk / "step_2").exists()
        assert SavedModel.open(disk / str(read_latest(disk))).load(state())["step"] == 1
    finally:
        subprocess.run(["umount", disk], check=True)


def test_a_staged_checkpoint_is_what_was_there_when_it_was_staged(tmp_path: Path) -> None:
    living = state(3.0)
    tensors = [living["model"][name].data for name in ("weight", "half", "count")]
    staged = stage_checkpoint(living, copies=True)
    for tensor in tensors:
        tensor.fill_(-1)
    write_checkpoint(tmp_path, "step_3", staged, INFO)
    loaded = SavedModel.open(tmp_path / "step_3").load(state())["model"]
    assert [float(loaded[name].max()) for name in ("weight", "half", "count")] == [3.0] * 3


def test_training_goes_on_while_a_checkpoint_is_written(tmp_path: Path) -> None:
    background, may_write = BackgroundWriter(), threading.Event()

    def write(group: dist.ProcessGroup) -> None:
        assert may_write.wait(60)
        save_in_background(tmp_path, "step_1", staged, group)

    staged = stage_checkpoint(state(1.0), copies=True)
    background.start(write)
    background.poll()
    sums = torch.ones(1)
    dist.all_reduce(sums)
    assert not (tmp_path / "step_1").exists() and read_latest(tmp_path) is None
    may_write.set()
    background.wait()
    assert SavedModel.open(tmp_path / str(read_latest(tmp_path))).load(state())["step"] == 1


def test_a_failure_in_the_background_is_raised_at_the_next_poll(tmp_path: Path) -> None:
    background = BackgroundWriter()
    broken = state(2.0)
    broken["nested"]["function"] = time.sleep
    staged = stage_checkpoint(broken, copies=True)
    background.start(lambda group: save_in_background(tmp_path, "step_2", staged, group))
    with pytest.raises(CheckpointError, match=r"cannot save .*time\.sleep") as raised:
        while True:
            background.poll()
    assert "\n" not in str(raised.value)
    assert hidden(tmp_path) == [] and not (tmp_path / "step_2").exists() and read_latest(tmp_path) is None
    # Reported once; the next one is written.
    staged = stage_checkpoint(state(3.0), copies=True)
    background.start(lambda group: save_in_background(tmp_path, "step_3", staged, group))
    background.wait()
    assert read_latest(tmp_path) == "step_3"


def save_in_background(root: Path, name: str, staged: StagedCheckpoint, group: dist.ProcessGroup) -> None:
    write_checkpoint(root, name, staged, INFO, group=group)
    publish(root, name, 1, group)


def start(scenario: str, root: Path, rank: int = 0) -> subprocess.Popen[str]:
    environment = {**os.environ, "PYTHONPATH": str(REPOSITORY), "OMP_NUM_THREADS": "1"}
    return subprocess.Popen(
        [sys.executable, __file__, scenario, str(root), str(rank)],
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        text=True,
        env=environment,
    )


@pytest.mark.parametrize("scenario", ["kill", "kill-background"])
def test_a_kill_while_saving_harms_nothing_and_is_cleaned_up(tmp_path: Path, scenario: str) -> None:
    process = start(scenario, tmp_path)
    output, _ = process.communicate(timeout=120)
    assert process.returncode == -signal.SIGKILL, output
    assert [name for name in hidden(tmp_path) if name.startswith(".step_2.tmp-")], "nothing was being written"
    assert not (tmp_path / "step_2").exists()
    assert SavedModel.open(tmp_path / str(read_latest(tmp_path))).load(state())["step"] == 1
    save_checkpoint(tmp_path, "step_2", state(2.0), INFO)
    assert hidden(tmp_path) == []


@pytest.mark.distributed
@pytest.mark.parametrize("scenario", ["two", "two-background"])
def test_two_ranks_save_and_fail_together(tmp_path: Path, scenario: str) -> None:
    processes = [start(scenario, tmp_path, rank) for rank in range(2)]
    outputs = [process.communicate(timeout=120)[0] for process in processes]
    assert [process.returncode for process in processes] == [0, 0], "\n".join(outputs)
    lines = [next(line for line in output.splitlines() if line.startswith("ERROR ")) for output in outputs]
    assert lines[0] == lines[1]
    assert "File too large" in lines[0] and "step_2" in lines[0]
    assert hidden(tmp_path) == [] and not (tmp_path / "step_2").exists()
    # Written by two ranks, read by one.
    wanted = {"weight": ShardedTensor.from_rank_offsets("weight", torch.zeros(4, 3), replica_id=0)}
    loaded = SavedModel.open(tmp_path / "step_1").load(wanted)
    assert torch.equal(loaded["weight"], torch.tensor([[1.0] * 3] * 2 + [[2.0] * 3] * 2))
    assert loaded["step"] == 1


def save(root: Path, name: str, sharded_state_dict: dict[str, Any], background: BackgroundWriter | None) -> None:
    """And makes it the latest."""
    staged = stage_checkpoint(sharded_state_dict, copies=background is not None)
    if background is None:
        write_checkpoint(root, name, staged, INFO)
        publish(root, name, 2)
    else:
        background.start(lambda group: save_in_background(root, name, staged, group))


def kill_while_saving(root: Path, background: BackgroundWriter | None) -> None:
    """Saves step_1, then dies of SIGKILL with step_2 half written."""
    save(root, "step_1", state(1.0), background)

    def kill_when_data_is_there() -> None:
        while not any(root.glob(".step_2.tmp-*/*.distcp")):
            time.sleep(0.001)
        os.kill(os.getpid(), signal.SIGKILL)

    large = state(2.0)
    large["model"]["large"] = ShardedTensor.from_rank_offsets("large", torch.zeros(16_000_000), replica_id=0)
    threading.Thread(target=kill_when_data_is_there, daemon=True).start()
    save(root, "step_2", large, background)
    if background is not None:
        background.wait()


def save_on_two_ranks(root: Path, rank: int, background: BackgroundWriter | None) -> None:
    """Saves step_1 from both ranks; then rank 1 alone cannot write, and both ranks must say so."""

    def sharded(columns: int, value: float) -> dict[str, Any]:
        shard = torch.full((2, columns), value)
        return {"weight": ShardedTensor.from_rank_offsets("weight", shard, (0, rank, 2), replica_id=0), "step": 1}

    save(root, "step_1", sharded(3, 1.0 + rank), background)
    if background is not None:
        background.wait()
    loaded = SavedModel.open(root / "step_1").load(sharded(3, 0.0))
    assert torch.equal(loaded["weight"], torch.full((2, 3), 1.0 + rank))
    if rank == 1:
        resource.setrlimit(resource.RLIMIT_FSIZE, (100_000, 100_000))
    try:
        save(root, "step_2", sharded(50_000, 0.0), background)
        if background is not None:
            background.wait()
    except CheckpointError as error:
        print("ERROR", error)


if __name__ == "__main__":
    cpu.install()
    torch.set_num_threads(1)
    scenario, root, rank = sys.argv[1], Path(sys.argv[2]), int(sys.argv[3])
    group = root.with_name(root.name + "-group")
    group.mkdir(exist_ok=True)
    kind, _, is_behind = scenario.partition("-")
    join_group(group, rank, 2 if kind == "two" else 1)
    background = BackgroundWriter() if is_behind else None
    if kind == "two":
        save_on_two_ranks(root, rank, background)
    else:
        kill_while_saving(root, background)
    dist.destroy_process_group()
