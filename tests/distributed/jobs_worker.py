"""Runs jobs one after the other in forks of one process: its imports take longer than a toy run.

A job: ``recipe`` and ``overrides``; ``processes`` to run it in; ``start_from``: a folder of checkpoints that is first copied
to the job's own; ``only_saves``: nothing is trained, what was loaded is saved again in ``checkpoint.directory``/again. The
first job that fails is the last.
"""

import json
import multiprocessing
import shutil
import sys
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist

from megatron_dmc.cli import main
from megatron_dmc.distributed import cpu
from megatron_dmc.distributed.world import world
from megatron_dmc.recipe import load_recipe
from megatron_dmc.training.trainer import Trainer


def run_job(recipe: str, overrides: list[str], start_from: str | None = None, only_saves: bool = False) -> int:
    if start_from is not None:
        if dist.get_rank() == 0:
            shutil.copytree(start_from, load_recipe(recipe, overrides).checkpoint.directory)
        dist.barrier()
    return load_and_save(recipe, overrides) if only_saves else main(["retrofit", recipe, *overrides])


def load_and_save(recipe: str, overrides: list[str]) -> int:
    values = load_recipe(recipe, overrides)
    with world(values.parallel):
        store = Trainer(values).store
        step, merge_fraction, multiplier = store.load()
        store.root = store.root / "again"
        store.save_full(step, 0, None, merge_fraction, multiplier)
    return 0


def run_in_group(job: dict[str, Any], processes: int, store: str, rank: int) -> None:
    dist.init_process_group("gloo", store=dist.FileStore(store, processes), rank=rank, world_size=processes)
    status = run_job(**job)
    dist.destroy_process_group()
    sys.exit(status)


def run_jobs(path: Path) -> None:
    context = multiprocessing.get_context("fork")
    for number, job in enumerate(json.loads(path.read_text())):
        processes, store = job.pop("processes"), f"{path}.store-{number}"
        ranks = [context.Process(target=run_in_group, args=(job, processes, store, rank)) for rank in range(processes)]
        for rank in ranks:
            rank.start()
        for rank in ranks:
            rank.join()
        if any(rank.exitcode for rank in ranks):
            sys.exit(f"failed: {job}")


if __name__ == "__main__":
    cpu.install()
    torch.set_num_threads(1)
    run_jobs(Path(sys.argv[1]))
