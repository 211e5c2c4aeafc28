"""Saving leaves a whole checkpoint or none: on a full disk, killed, with a rank that cannot write, in the background."""

import os
import signal
import subprocess
import threading
import time
from pathlib import Path

import pytest
import torch
import torch.distributed as dist
from megatron.core.dist_checkpointing.mapping import ShardedTensor

from megatron_dmc.checkpoint import (
    CheckpointError,
    SavedModel,
    read_latest,
    save_checkpoint,
    update_latest,
)
from megatron_dmc.checkpoint.background import BackgroundWriter
from megatron_dmc.checkpoint.save import stage_checkpoint, write_checkpoint
from tests.checkpoint.saving_worker import save_in_background
from tests.support.checkpoints import INFO, hidden, state
from tests.support.processes import run_ranks

pytestmark = pytest.mark.usefixtures("one_process")

WORKER = "tests.checkpoint.saving_worker"


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


@pytest.mark.parametrize("scenario", ["kill", "kill-background"])
def test_a_kill_while_saving_harms_nothing_and_is_cleaned_up(tmp_path: Path, scenario: str) -> None:
    (done,) = run_ranks(1, "-m", WORKER, scenario, tmp_path, timeout=120)
    assert done.returncode == -signal.SIGKILL, done.stderr
    assert [name for name in hidden(tmp_path) if name.startswith(".step_2.tmp-")], "nothing was being written"
    assert not (tmp_path / "step_2").exists()
    assert SavedModel.open(tmp_path / str(read_latest(tmp_path))).load(state())["step"] == 1
    save_checkpoint(tmp_path, "step_2", state(2.0), INFO)
    assert hidden(tmp_path) == []


@pytest.mark.distributed
@pytest.mark.parametrize("scenario", ["two", "two-background"])
def test_two_ranks_save_and_fail_together(tmp_path: Path, scenario: str) -> None:
    ranks = run_ranks(2, "-m", WORKER, scenario, tmp_path, timeout=120)
    assert [rank.returncode for rank in ranks] == [0, 0], "\n".join(rank.stderr for rank in ranks)
    lines = [next(line for line in rank.stdout.splitlines() if line.startswith("ERROR ")) for rank in ranks]
    assert lines[0] == lines[1]
    assert "File too large" in lines[0] and "step_2" in lines[0]
    assert hidden(tmp_path) == [] and not (tmp_path / "step_2").exists()
    # Written by two ranks, read by one.
    wanted = {"weight": ShardedTensor.from_rank_offsets("weight", torch.zeros(4, 3), replica_id=0)}
    loaded = SavedModel.open(tmp_path / "step_1").load(wanted)
    assert torch.equal(loaded["weight"], torch.tensor([[1.0] * 3] * 2 + [[2.0] * 3] * 2))
    assert loaded["step"] == 1
