"""What every process of a cluster check does: its part of each layout's runs, one layout after the other.

Started once by torchrun (or by anything that sets RANK, WORLD_SIZE, LOCAL_RANK, MASTER_ADDR and MASTER_PORT) with as many
processes as the largest layout takes; a smaller one runs on the first of them. Runs of one process are shared out.
"""

import argparse
import contextlib
import gc
import json
import os
import warnings
from collections.abc import Iterator, Sequence
from datetime import timedelta
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist

from megatron_dmc.cluster_check.cases import (
    Case,
    base_recipe,
    case_recipe,
    cases_here,
    initial_weights,
    run_folder,
    scatter_decisions,
    start_recipe,
)
from megatron_dmc.cluster_check.layouts import Layout, all_layouts
from megatron_dmc.config import ConfigError
from megatron_dmc.distributed.world import world
from megatron_dmc.training.monitor import StepRecord
from megatron_dmc.training.schedule import StepPlan
from megatron_dmc.training.trainer import StepResult, Trainer

# A rank that waits longer for another has lost it.
_PATIENCE = timedelta(minutes=10)


class RecordingTrainer(Trainer):
    """A trainer that keeps what is to be compared."""

    def __init__(self, *arguments: Any) -> None:
        super().__init__(*arguments)
        self.steps: list[dict[str, Any]] = []

    def _record(self, plan: StepPlan, result: StepResult, learning_rate: float, seconds: float) -> StepRecord:
        record = super()._record(plan, result, learning_rate, seconds)
        self.steps.append(
            {
                "lm_loss": record.lm_loss,
                "distillation_loss": record.distillation_loss,
                "gradient_norm": record.grad_norm,
                "compression_loss": record.compression_loss,
                "compression_ratio": record.compression_ratio,
                "noisy_compression_ratio": record.noisy_compression_ratio,
                "counts": result.counts.long().tolist(),
                "seconds": seconds,
            }
        )
        return record


def main(
    arguments: list[str] | None = None,
    trainer: type[RecordingTrainer] = RecordingTrainer,
    known_cases: Sequence[Case] | None = None,
) -> None:
    """Runs the named layouts of the named cases in ``folder``, which all processes see.

    Args:
        arguments: of the command line; None: this process's.
        trainer: another one, to see whether it is found out.
        known_cases: that the arguments name; None: this project's.
    """
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("folder", type=Path)
    parser.add_argument("--layouts", nargs="+", required=True)
    parser.add_argument("--cases", nargs="+", required=True)
    parser.add_argument("--most-processes", type=int, default=8)
    parsed = parser.parse_args(arguments)
    warnings.filterwarnings("ignore")
    layouts = [layout for layout in all_layouts(parsed.most_processes) if layout.name in parsed.layouts]
    cases = [case for case in known_cases or cases_here() if case.name in parsed.cases]
    _Worker(parsed.folder, trainer).run(layouts, cases)


class _Worker:
    def __init__(self, folder: Path, trainer: type[RecordingTrainer]) -> None:
        self.folder, self.trainer = folder, trainer
        self.rank, self.processes = int(os.environ["RANK"]), int(os.environ["WORLD_SIZE"])
        if torch.cuda.is_available():
            torch.cuda.set_device(int(os.environ.get("LOCAL_RANK", 0)))
        else:
            torch.set_num_threads(1)
        self.store: dist.Store = next(dist.rendezvous("env://", timeout=_PATIENCE))[0]

    def run(self, layouts: list[Layout], cases: list[Case]) -> None:
        mine = cases[self.rank :: self.processes]
        for case in mine:
            with self._world("start", 1):
                _prepare(self.folder, case)
        self._meet("start")
        for i, (layout, case) in enumerate(
            (layout, case) for layout in layouts if layout.processes == 1 for case in cases
        ):
            if i % self.processes == self.rank:
                with self._world("alone", 1):
                    self._run(layout, case)
        self._meet("alone")
        for layout in layouts:
            if layout.processes > 1:
                if self.rank < layout.processes:
                    with self._world(layout.name, layout.processes):
                        for case in cases:
                            self._run(layout, case)
                self._meet(layout.name)

    def _run(self, layout: Layout, case: Case) -> None:
        folder = run_folder(self.folder, case, layout)
        if (folder / "result.json").exists():
            return
        folder.mkdir(parents=True, exist_ok=True)
        try:
            try:
                recipe = case_recipe(self.folder, case, layout)
            except ConfigError as error:
                result: dict[str, Any] = {"refused": str(error)}
            else:
                with world(recipe.parallel):
                    trainer = self.trainer(recipe)
                    trainer.run()
                result = {"steps": trainer.steps}
                # A model is part of cycles of references, and holds the groups of its layout with all their threads.
                del trainer
                gc.collect()
        except BaseException as error:
            (folder / f"error-{self.rank}").write_text(f"{type(error).__name__}: {error}")
            raise
        if dist.get_rank() == 0:
            temporary = folder / "result.tmp"
            temporary.write_text(json.dumps(result))
            temporary.replace(folder / "result.json")

    @contextlib.contextmanager
    def _world(self, name: str, size: int) -> Iterator[None]:
        """A process group of the first ``size`` processes, or of this one alone."""
        backend = "nccl" if torch.cuda.is_available() else "gloo"
        # Under a name of its own in the store: the worlds before have left their addresses there.
        store = dist.HashStore() if size == 1 else dist.PrefixStore(f"world of {name}", self.store)
        rank = 0 if size == 1 else self.rank
        dist.init_process_group(backend, store=store, rank=rank, world_size=size, timeout=_PATIENCE)
        yield
        dist.destroy_process_group()

    def _meet(self, name: str) -> None:
        """Waits, without a process group, until all processes are here."""
        key = f"done with {name}"
        if self.store.add(key, 1) == self.processes:
            self.store.set(f"all {key}", "")
        self.store.wait([f"all {key}"], timedelta(hours=2))


def _prepare(folder: Path, case: Case) -> None:
    """Saves the base and the initial weights of a case."""
    if initial_weights(folder, case).exists():
        return
    for recipe, name in ((base_recipe, "base"), (start_recipe, "initial")):
        with world():
            trainer = Trainer(recipe(folder, case))
            trainer.store.load()
            if name == "initial":
                scatter_decisions(trainer.model[0])
            trainer.store.save_weights(name, 0, 0, None)


if __name__ == "__main__":
    main()
