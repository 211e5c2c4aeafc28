"""What a run saves and where it goes on: weights, optimizer, position and gate, by way of megatron-core's checkpoints."""

import os
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any, Literal

import torch
from megatron.core import parallel_state
from megatron.core.optimizer import MegatronOptimizer

from megatron_dmc.config import ConfigError
from megatron_dmc.training.arguments import Recipe, recipe_from_dict
from megatron_dmc.training.checkpoint import (
    CheckpointInfo,
    check_checkpoint,
    load_checkpoint,
    prepare_optimizer_for_load,
    publish,
    read_latest,
    restore_adam_steps,
    save_checkpoint,
)


def model_state(model_chunks: Sequence[torch.nn.Module], metadata: dict[str, Any] | None = None) -> dict[str, Any]:
    """The model's sharded state dict; tensors are named globally, whatever the layout."""
    chunks = [_without_wrapper(chunk) for chunk in model_chunks]
    if len(chunks) == 1:
        return {"model": chunks[0].sharded_state_dict(metadata=metadata)}
    return {f"model{i}": chunk.sharded_state_dict(metadata=metadata) for i, chunk in enumerate(chunks)}


def set_model_state(
    model_chunks: Sequence[torch.nn.Module], state: dict[str, Any], may_be_missing: Callable[[str], bool] | None = None
) -> None:
    """Puts a loaded state dict into the model; raises RuntimeError if a weight is missing that may not be."""
    chunks = [_without_wrapper(chunk) for chunk in model_chunks]
    for i, chunk in enumerate(chunks):
        part = state["model" if len(chunks) == 1 else f"model{i}"]
        missing = chunk.load_state_dict(part, strict=may_be_missing is None)
        if may_be_missing is not None:
            lost = [name for name in missing.missing_keys if not may_be_missing(name)]
            if lost or missing.unexpected_keys:
                raise RuntimeError(f"weights do not fit: missing {lost}, unexpected {missing.unexpected_keys}")


def is_dmc_checkpoint(info: CheckpointInfo) -> bool:
    """Whether the checkpoint's model merges, or is the base of a retrofit."""
    return recipe_from_dict(info.recipe).merges


# What a merging model's weights mean depends on these.
MEANING = ("decision_source", "decision_bias", "decision_scale", "window_size", "per_layer")


def check_fits(folder: str | Path, recipe: Recipe) -> CheckpointInfo:
    """Whether a checkpoint is whole and its weights mean in this recipe's model what they meant in their own.

    Raises:
        CheckpointError, ConfigError: damaged, or a retrofit with other decisions than the recipe's.
    """
    info = check_checkpoint(folder)
    if is_dmc_checkpoint(info):
        if not recipe.merges:
            raise ConfigError(f"{folder} is a retrofitted model, but no phase merges: its decisions would be dropped")
        saved = recipe_from_dict(info.recipe).dmc
        for name in MEANING:
            mine, theirs = getattr(recipe.dmc, name), getattr(saved, name)
            if mine != theirs:
                raise ConfigError(f"dmc.{name} is {mine!r}, but {folder} was trained with {theirs!r}; set it to that")
    return info


def load_weights(folder: str | Path, model_chunks: Sequence[torch.nn.Module], recipe: Recipe) -> None:
    """Loads a checkpoint's weights, in any layout. Decision weights that a base lacks keep their zeros.

    Raises:
        CheckpointError, ConfigError: the checkpoint is damaged, of another model, or of other decisions.
    """
    is_base = not is_dmc_checkpoint(check_fits(folder, recipe))
    may_be_missing = _is_decision if is_base else None
    state = load_checkpoint(
        folder, model_state(model_chunks), expected_model=recipe.to_dict()["model"], may_be_missing=may_be_missing
    )
    set_model_state(model_chunks, state, may_be_missing)


def _is_decision(name: str) -> bool:
    return ".decision." in name


def check_writable(folder: Path) -> None:
    """Raises ConfigError if checkpoints could not be written; called before anything is built, and makes nothing."""
    existing = next(path for path in (folder, *folder.absolute().parents) if path.exists())
    if not existing.is_dir() or not os.access(existing, os.W_OK):
        raise ConfigError(f"checkpoint.directory {folder} cannot be written ({existing} is no folder to write in)")


def _without_wrapper(chunk: torch.nn.Module) -> Any:
    """The module inside megatron-core's DistributedDataParallel, if any."""
    return getattr(chunk, "module", chunk)


class RunStore:
    """A run's checkpoints below ``recipe.checkpoint.directory``."""

    def __init__(self, recipe: Recipe, model: list[torch.nn.Module], optimizer: MegatronOptimizer) -> None:
        self.recipe, self.model, self.optimizer = recipe, model, optimizer
        self.root = Path(recipe.checkpoint.directory)
        self.metadata = {
            # The one form that megatron-core both saves and loads with torch's Adam.
            "distrib_optim_sharding_type": "dp_reshardable",
            "singleton_local_shards": False,
            "chained_optim_avoid_prefix": True,
            "dp_cp_group": parallel_state.get_data_parallel_group(with_context_parallel=True),
        }

    def load(self) -> tuple[int, float]:
        """Resumes from ``latest``, else starts from ``load_base``, else from the initial weights.

        Returns:
            Steps done and the share of merged tokens that the gate starts from.

        Raises:
            CheckpointError, ConfigError: the checkpoint is damaged, or the recipe differs where it must not.
        """
        latest = read_latest(self.root)
        if latest is not None:
            return self._resume(self.root / latest)
        if self.recipe.checkpoint.load_base is not None:
            load_weights(self.recipe.checkpoint.load_base, self.model, self.recipe)
        return 0, 0.0

    def _resume(self, folder: Path) -> tuple[int, float]:
        info = check_checkpoint(folder)
        self._check_same_run(folder, info)
        prepare_optimizer_for_load(self.optimizer)
        state = model_state(self.model, self.metadata)
        state["optimizer"] = self.optimizer.sharded_state_dict(state, is_loading=True, metadata=self.metadata)
        state["merge_fraction"] = 0.0
        state = load_checkpoint(folder, state, expected_model=self.recipe.to_dict()["model"])
        set_model_state(self.model, state)
        with torch.no_grad():
            self.optimizer.load_state_dict(state["optimizer"])
        restore_adam_steps(self.optimizer)
        return info.step, state["merge_fraction"]

    def _check_same_run(self, folder: Path, info: CheckpointInfo) -> None:
        """The data's position is steps x batch: what it depends on must not change under a run."""
        mine, saved = self.recipe.to_dict(), recipe_from_dict(info.recipe).to_dict()
        for section, names in (
            ("training", ("global_batch_size", "bf16")),
            ("data", ("sequence_length", "seed", "train")),
            ("dmc", tuple(mine["dmc"])),
        ):
            for name in names:
                if saved[section][name] != mine[section][name]:
                    raise ConfigError(
                        f"{section}.{name} is {mine[section][name]!r}, but {folder} was trained with "
                        f"{saved[section][name]!r}; set it back, or start in a new checkpoint.directory with "
                        "checkpoint.load_base"
                    )
        # Learning rates may be lowered on the way; what decides where a step stands may not.
        kept = ("kind", "steps", "start_compression_ratio")
        plans = [[tuple(phase[name] for name in kept) for phase in recipe["phases"]] for recipe in (saved, mine)]
        if plans[0] != plans[1]:
            raise ConfigError(
                f"phases ({', '.join(kept)}) differ from those of {folder}; set them back, or start in a new "
                "checkpoint.directory with checkpoint.load_base"
            )

    def save_weights(self, name: str, step: int, phase: int, ratio: float | None) -> None:
        self._save(name, model_state(self.model), self._info("weights", step, phase, ratio))

    def save_full(self, step: int, phase: int, ratio: float | None, merge_fraction: float) -> None:
        """Saves everything a resume needs, then moves ``latest`` to it."""
        name = f"step_{step:08d}"
        state = model_state(self.model, self.metadata)
        state["optimizer"] = self.optimizer.sharded_state_dict(state, metadata=self.metadata)
        state["merge_fraction"] = merge_fraction
        self._save(name, state, self._info("full", step, phase, ratio))
        publish(self.root, name, self.recipe.checkpoint.keep_last)

    def _save(self, name: str, state: dict[str, Any], info: CheckpointInfo) -> None:
        save_checkpoint(self.root, name, state, info, self.recipe.data.tokenizer)

    def _info(self, kind: Literal["full", "weights"], step: int, phase: int, ratio: float | None) -> CheckpointInfo:
        return CheckpointInfo(
            kind=kind,
            recipe=self.recipe.to_dict(),
            step=step,
            consumed_samples=step * self.recipe.training.global_batch_size,
            phase=phase,
            compression_ratio=ratio,
        )
