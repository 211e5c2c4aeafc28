"""A checkpoint as a model that is ready to evaluate or to generate, in one process."""

from dataclasses import dataclass
from pathlib import Path

import torch
from megatron.core.models.gpt import GPTModel

from megatron_dmc.checkpoint import CheckpointInfo, check_checkpoint
from megatron_dmc.checkpoint.weights import check_has_merged, is_dmc_checkpoint, load_weights
from megatron_dmc.config import ConfigError
from megatron_dmc.data.tokenizer import Tokenizer, load_tokenizer
from megatron_dmc.distributed.world import seed_weights
from megatron_dmc.model.gpt import build_model, transformer_config
from megatron_dmc.recipe import Recipe, recipe_from_dict


@dataclass(frozen=True)
class LoadedModel:
    """A model in eval mode with what belongs to it. merges: whether it has decisions."""

    model: GPTModel
    recipe: Recipe
    info: CheckpointInfo
    tokenizer: Tokenizer
    merges: bool

    @property
    def device(self) -> torch.device:
        return next(self.model.parameters()).device


def load_model(folder: str | Path, base: str | Path | None = None) -> LoadedModel:
    """Loads a checkpoint of any layout into this process, bfloat16 on a GPU, float32 on a CPU; inside ``world()``.

    Args:
        base: where an adapter's base is now; None: where it was.

    Raises:
        CheckpointError, ConfigError: the checkpoint is damaged or of another version, or ``base`` is not its base.
    """
    info = check_checkpoint(folder)
    recipe = recipe_from_dict(info.recipe)
    seed_weights(recipe.training.seed)
    merges = is_dmc_checkpoint(info)
    on_gpu = torch.cuda.is_available()
    config = transformer_config(recipe.model, bf16=on_gpu)
    model = build_model(recipe.model, recipe.dmc if merges else None, config)
    if on_gpu:
        model.cuda().bfloat16()
    load_weights(folder, [model], recipe, base)
    return LoadedModel(model.eval(), recipe, info, load_tokenizer(Path(folder, "tokenizer")), merges)


def require_merging(loaded: LoadedModel, folder: str | Path) -> None:
    """Raises ConfigError for a model that never learned to merge."""
    if not loaded.merges:
        raise ConfigError(f"{folder} is a base model without decisions; name a checkpoint of a retrofit")
    check_has_merged(folder, loaded.recipe, loaded.info)
