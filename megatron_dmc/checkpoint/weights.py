"""A model's weights from checkpoints: a base's, a retrofit's, or an adapter's beside its base."""

import hashlib
import os
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist

from megatron_dmc.checkpoint import CheckpointError, CheckpointInfo, check_checkpoint, load_checkpoint
from megatron_dmc.config import ConfigError
from megatron_dmc.recipe import Recipe, recipe_from_dict

# What a merging model's weights mean depends on these.
MEANING = (
    "decision_source",
    "decision_bias",
    "decision_scale",
    "local_window",
    "operation",
    "window_size",
    "per_layer",
)
_BLOCK_BYTES = 1 << 16
_BLOCKS_PER_FILE = 4


def model_state(model_chunks: Sequence[torch.nn.Module]) -> dict[str, Any]:
    """The model's sharded state dict; tensors are named globally, whatever the layout."""
    parts = [
        {name: value for name, value in _without_wrapper(chunk).sharded_state_dict().items() if not is_extra(name)}
        for chunk in model_chunks
    ]
    return {"model": parts[0]} if len(parts) == 1 else {f"model{i}": part for i, part in enumerate(parts)}


def set_model_state(
    model_chunks: Sequence[torch.nn.Module], state: dict[str, Any], may_be_missing: Callable[[str], bool] | None = None
) -> None:
    """Puts a loaded state dict into the model; raises RuntimeError if a weight is missing that may not be."""
    for i, chunk in enumerate(model_chunks):
        part = state["model" if len(model_chunks) == 1 else f"model{i}"]
        found = _without_wrapper(chunk).load_state_dict(part, strict=False)
        lost = [
            name for name in found.missing_keys if not (is_extra(name) or (may_be_missing and may_be_missing(name)))
        ]
        if lost or found.unexpected_keys:
            raise RuntimeError(f"weights do not fit: missing {lost}, unexpected {found.unexpected_keys}")


def is_extra(name: str) -> bool:
    """Whether it is what Transformer Engine's layers remember beside their weights: the history of FP8 scales.

    Here FP8 has none (see megatron_config), layers of other makes know nothing of it, and Transformer Engine unpickles it.
    """
    return name.endswith("_extra_state")


def only_decisions(state: dict[str, Any]) -> dict[str, Any]:
    """What an adapter learns of a :func:`model_state`."""
    return {chunk: {name: value for name, value in part.items() if is_decision(name)} for chunk, part in state.items()}


def is_decision(name: str) -> bool:
    """Whether a parameter belongs to the decisions' projection."""
    return ".decision." in name


def is_base_weight(name: str) -> bool:
    return not is_decision(name)


def saved_recipe(folder: str | Path, info: CheckpointInfo) -> Recipe:
    """The recipe that a checkpoint was written with; raises CheckpointError if it is not understood."""
    try:
        return recipe_from_dict(info.recipe)
    except ConfigError as error:
        raise CheckpointError(
            f"{folder}/dmc.json holds a recipe that this version of megatron_dmc does not understand: {error}"
        ) from None


def is_dmc_checkpoint(info: CheckpointInfo) -> bool:
    """Whether the checkpoint's model merges, or is the base of a retrofit."""
    return recipe_from_dict(info.recipe).merges


def check_has_merged(folder: str | Path, recipe: Recipe, info: CheckpointInfo) -> None:
    """Raises ConfigError for a retrofit's checkpoint from before its first merging phase: its decisions mean nothing."""
    if not any(phase.merges for phase in recipe.phases[: info.phase + 1]):
        raise ConfigError(f"{folder} was saved before its run began to merge; name a later checkpoint")


def check_fits(folder: str | Path, recipe: Recipe, base: str | Path | None = None) -> CheckpointInfo:
    """Whether a checkpoint is whole and its weights mean in this recipe's model what they meant in their own.

    Args:
        base: where an adapter's base is now; None: where it was.

    Raises:
        CheckpointError, ConfigError: damaged, or a retrofit with other decisions than the recipe's.
    """
    info = check_checkpoint(folder)
    saved = saved_recipe(folder, info)
    if saved.merges:
        if not recipe.merges:
            raise ConfigError(f"{folder} is a retrofitted model, but no phase merges: its decisions would be dropped")
        for name in MEANING:
            mine, theirs = getattr(recipe.dmc, name), getattr(saved.dmc, name)
            if mine != theirs:
                raise ConfigError(f"dmc.{name} is {mine!r}, but {folder} was trained with {theirs!r}; set it to that")
        if recipe.trains_adapter and info.base is None:
            raise ConfigError(
                f"{folder} is a retrofit with all its weights trained: an adapter needs a base, or an adapter of one; name "
                "that in checkpoint.load_base, or set training.train full"
            )
    if info.base is not None:
        base_folder(folder, info, base)
    elif base is not None:
        raise ConfigError(f"{folder} is no adapter, it holds all its weights; leave the base {base} out")
    return info


def check_teacher(folder: str | Path, recipe: Recipe) -> None:
    """Raises CheckpointError or ConfigError unless the checkpoint is a base of the same model, its vocabulary included."""
    if saved_recipe(folder, info := check_checkpoint(folder)).merges:
        raise ConfigError(f"{folder} is a retrofitted model; name its base in distillation.teacher")
    saved, mine = info.recipe["model"]["vocab_size"], recipe.model.vocab_size
    if saved != mine:
        raise ConfigError(
            f"the teacher {folder} has a vocabulary of {saved}, model.vocab_size is {mine}: their logits cannot be compared; "
            "name a base with the same tokenizer"
        )


def load_weights(
    folder: str | Path, model_chunks: Sequence[torch.nn.Module], recipe: Recipe, base: str | Path | None = None
) -> None:
    """Loads a checkpoint's weights, in any layout. Decision weights that a base lacks keep their zeros.

    Args:
        base: where an adapter's base is now; None: where it was.

    Raises:
        CheckpointError, ConfigError: the checkpoint is damaged, of another model, or of other decisions.
    """
    info = check_fits(folder, recipe, base)
    state, lacks = model_state(model_chunks), None
    if info.base is not None:
        load_weights(_base_path(folder, info, base), model_chunks, recipe)
        state, lacks = only_decisions(state), is_base_weight
    elif not is_dmc_checkpoint(info):
        lacks = is_decision
    state = load_checkpoint(folder, state, expected_model=recipe.to_dict()["model"], may_be_missing=lacks)
    set_model_state(model_chunks, state, lacks)


def load_teacher(folder: str | Path, model_chunks: Sequence[torch.nn.Module], recipe: Recipe) -> None:
    """Loads a base into a model without decisions."""
    state = load_checkpoint(folder, model_state(model_chunks), expected_model=recipe.to_dict()["model"])
    set_model_state(model_chunks, state)


def adapter_base(load_base: str | Path, root: Path) -> dict[str, str]:
    """What an adapter's checkpoints in ``root`` say of their base: its folder, seen from them, and its digest.

    ``load_base`` may itself be an adapter, whose base it is then.
    """
    info = check_checkpoint(load_base)
    folder = Path(load_base) if info.base is None else base_folder(load_base, info)
    return {"folder": os.path.relpath(folder, root / "any"), "digest": _digest(folder)}


def base_folder(folder: str | Path, info: CheckpointInfo, base: str | Path | None = None) -> Path:
    """The folder of an adapter's base, which must be the one it was trained on.

    Raises:
        CheckpointError: it is not there, it is damaged, or it is another.
    """
    assert info.base is not None
    found = _base_path(folder, info, base)
    if not (found / "dmc.json").is_file():
        raise CheckpointError(
            f"{folder} is an adapter, and its base {os.path.normpath(found)} is not there; put it back, or name where it "
            "is now with --base (inspect, generate and megatron_to_hf.py have it)"
        )
    check_checkpoint(found)
    if _digest(found) != info.base["digest"]:
        raise CheckpointError(
            f"{folder} is an adapter of another base than {os.path.normpath(found)}; put its own back, or name where it is "
            "now with --base"
        )
    return found


def _base_path(folder: str | Path, info: CheckpointInfo, base: str | Path | None) -> Path:
    assert info.base is not None
    return Path(folder, info.base["folder"]) if base is None else Path(base)


def _digest(folder: Path) -> str:
    """Tells a checkpoint from another; SHA-256 over its small files and some blocks of each large one. On all ranks."""
    answer: list[str] = [""]
    if dist.get_rank() == 0:
        digest = hashlib.sha256()
        for path in sorted((folder / "dmc.json", folder / ".metadata", *folder.glob("*.distcp"))):
            size = path.stat().st_size
            digest.update(f"{path.name} {size}\n".encode())
            with open(path, "rb") as file:
                for i in range(_BLOCKS_PER_FILE):
                    file.seek(max(size - _BLOCK_BYTES, 0) * i // (_BLOCKS_PER_FILE - 1))
                    digest.update(file.read(_BLOCK_BYTES))
        answer = [digest.hexdigest()]
    dist.broadcast_object_list(answer)
    return answer[0]


def _without_wrapper(chunk: Any) -> Any:
    """The module inside megatron-core's DistributedDataParallel and Float16Module, if any."""
    while hasattr(chunk, "module"):
        chunk = chunk.module
    return chunk
