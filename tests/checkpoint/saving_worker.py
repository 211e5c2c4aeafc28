"""Ranks that are killed, or cannot write, while they save: SCENARIO FOLDER.

The scenario is ``kill`` or ``two``, or one of them with ``-background``.
"""

import os
import resource
import signal
import sys
import threading
import time
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
from megatron.core.dist_checkpointing.mapping import ShardedTensor

from megatron_dmc.checkpoint import CheckpointError, SavedModel, publish
from megatron_dmc.checkpoint.background import BackgroundWriter
from megatron_dmc.checkpoint.save import StagedCheckpoint, stage_checkpoint, write_checkpoint
from megatron_dmc.distributed import cpu
from tests.support.checkpoints import INFO, state


def save_in_background(root: Path, name: str, staged: StagedCheckpoint, group: dist.ProcessGroup) -> None:
    write_checkpoint(root, name, staged, INFO, group=group)
    publish(root, name, 1, group)


def save(root: Path, name: str, sharded_state_dict: dict[str, Any], background: BackgroundWriter | None) -> None:
    """Saves a checkpoint and makes it the latest."""
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
    scenario, root = sys.argv[1], Path(sys.argv[2])
    dist.init_process_group("gloo")
    kind, _, where = scenario.partition("-")
    background = BackgroundWriter() if where == "background" else None
    if kind == "two":
        save_on_two_ranks(root, dist.get_rank(), background)
    else:
        kill_while_saving(root, background)
    dist.destroy_process_group()
