"""A checkpoint as a model that is ready to evaluate or to generate, in one process."""

from dataclasses import dataclass
from pathlib import Path

import torch
from megatron.core.models.gpt import GPTModel

from megatron_dmc.checkpoint import SavedModel
from megatron_dmc.config import ConfigError
from megatron_dmc.data.tokenizer import Tokenizer, load_tokenizer
from megatron_dmc.distributed.world import seed_weights
from megatron_dmc.model.gpt import build_model, transformer_config
from megatron_dmc.recipe import Recipe


@dataclass(frozen=True)
class LoadedModel:
    """A model in eval mode with what belongs to it.

    Attributes:
        merges: whether it has decisions.
        compression_ratio: noise-free, of the last global batch before it was saved; None where nothing merged.
        vocabulary: tokens that may be generated, the first logits; None: all.
    """

    model: GPTModel
    recipe: Recipe
    tokenizer: Tokenizer
    merges: bool
    compression_ratio: float | None = None
    vocabulary: int | None = None

    @property
    def device(self) -> torch.device:
        return next(self.model.parameters()).device


def load_model(folder: str | Path, base: str | Path | None = None, *, must_merge: bool = False) -> LoadedModel:
    """Loads a checkpoint of any layout into this process, bfloat16 on a GPU, float32 on a CPU; inside ``single_process()``.

    Args:
        base: where an adapter's base is now; None: where it was.
        must_merge: refuses a model that never learned to merge, before it is built.

    Raises:
        CheckpointError, ConfigError: the checkpoint is damaged or of another version, ``base`` is not its base, or it must
            merge and does not.
    """
    saved = SavedModel.open(folder, base)
    if must_merge:
        if not saved.merges:
            raise ConfigError(f"{folder} is a base model without decisions; name a checkpoint of a retrofit")
        saved.check_has_merged()
    # Before the weights, which take minutes.
    tokenizer = load_tokenizer(saved.tokenizer)
    recipe = saved.recipe
    seed_weights(recipe.training.seed)
    on_gpu = torch.cuda.is_available()
    config = transformer_config(recipe.model, bf16=on_gpu)
    model = build_model(recipe.model, saved.dmc, config)
    if on_gpu:
        model.cuda().bfloat16()
    saved.load_into([model])
    return LoadedModel(
        model.eval(),
        recipe,
        tokenizer,
        saved.merges,
        saved.info.compression_ratio,
        saved.vocabulary,
    )
