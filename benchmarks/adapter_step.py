"""A whole training step of an adapter against full training's, with a teacher and without, and what either holds for it.

    python benchmarks/adapter_step.py

The project's trainer at work: forward and backward pass, gradients reduced and clipped, Adam, statistics. Held: gradient
buffers, fp32 main parameters and Adam's moments.
"""

import argparse
import functools
import itertools
import tempfile
from collections.abc import Iterator
from dataclasses import asdict, replace
from pathlib import Path
from typing import Any

import common
import torch
from models import SIZES

from megatron_dmc.data import build_indexed_dataset, standard_library_documents
from megatron_dmc.data.tokenizer import train_tokenizer
from megatron_dmc.distributed.world import world
from megatron_dmc.recipe import Recipe, recipe_from_dict
from megatron_dmc.training.schedule import plan_step
from megatron_dmc.training.trainer import Trainer

KINDS = [(train, weight) for weight in (0.0, 1.0) for train in ("full", "adapter")]


def recipe(folder: Path, seq: int, train: str, weight: float) -> Recipe:
    values: dict[str, Any] = {
        "model": asdict(SIZES),
        "dmc": {"target_compression_ratio": 4.0, "local_window": min(256, seq // 8)},
        "data": {
            "train": [str(folder / "text")],
            "tokenizer": str(folder / "tokenizer"),
            "sequence_length": seq,
            "cache": str(folder / "cache"),
        },
        "phases": [{"kind": "compress", "steps": 1000, "lr": 1e-4}],
        "training": {"train": train, "global_batch_size": 1, "bf16": False},
        "distillation": {"weight": weight},
        "checkpoint": {"directory": str(folder / train), "load_base": str(folder / "base" / "final")},
        "monitor": {"progress_bar": False},
    }
    return recipe_from_dict(values)


def prepare(folder: Path, seq: int) -> None:
    """A text, and an untrained base."""
    texts = list(itertools.islice(standard_library_documents(), 300))
    build_indexed_dataset(texts, train_tokenizer(texts, 2048, folder / "tokenizer"), str(folder / "text"))
    base = recipe(folder, seq, "full", 0.0)
    pretrain = replace(base.phases[0], kind="pretrain", steps=1)
    checkpoint = replace(base.checkpoint, directory=str(folder / "base"), load_base=None)
    Trainer(replace(base, phases=[pretrain], checkpoint=checkpoint)).run()


def step(trainer: Trainer) -> None:
    trainer._train_step(plan_step(trainer.recipe.phases, trainer.recipe.dmc, trainer.step))
    trainer.step += 1


def held_bytes(trainer: Trainer) -> int:
    """Gradient buffers, main parameters that are not the model's own, and the optimizer's state, after a step."""
    own = {parameter.untyped_storage().data_ptr() for chunk in trainer.model for parameter in chunk.parameters()}
    storages = {buffer.grad_data.untyped_storage() for chunk in trainer.model for buffer in _buffers(chunk)}
    found = {storage.data_ptr(): storage.nbytes() for storage in storages}
    for part in getattr(trainer.optimizer, "chained_optimizers", [trainer.optimizer]):
        mains = [tensor for group in part.optimizer.param_groups for tensor in group["params"]]
        moments = [x for state in part.optimizer.state.values() for x in state.values() if isinstance(x, torch.Tensor)]
        for tensor in (*mains, *moments):
            storage = tensor.untyped_storage()
            if storage.data_ptr() not in own:
                found[storage.data_ptr()] = storage.nbytes()
    return sum(found.values())


def _buffers(chunk: Any) -> Iterator[Any]:
    return itertools.chain(chunk.buffers, chunk.expert_parallel_buffers)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--seq", type=int, default=2048)
    common.add_timing_options(parser)
    options = parser.parse_args()
    torch.set_num_threads(options.threads)
    with tempfile.TemporaryDirectory() as name, world():
        folder = Path(name)
        prepare(folder, options.seq)
        trainers = {
            f"{train}, teacher" if w else train: Trainer(recipe(folder, options.seq, train, w)) for train, w in KINDS
        }
        for trainer in trainers.values():
            trainer.store.load()
        steps = {name: functools.partial(step, trainer) for name, trainer in trainers.items()}
        seconds = common.interleaved_seconds(steps, options.rounds, options.clock)
        held = {name: held_bytes(trainer) for name, trainer in trainers.items()}
    rows = []
    for name in trainers:
        full = name.replace("adapter", "full")
        rows.append(
            {
                "trained": name,
                "ms": common.median_ms(seconds[name]),
                "time over full": common.ratio_to(full, {key: seconds[key] for key in (full, name)})[name],
                "held MiB": held[name] / 2**20,
                "held over full": held[name] / held[full],
            }
        )
    settings = {"clock": options.clock, "seq": options.seq, **vars(SIZES)}
    common.report("adapter_step", f"one training step at 1 x {options.seq} tokens, float32", rows, **settings)


if __name__ == "__main__":
    main()
