"""A Hugging Face folder -> a checkpoint of this project."""

import logging
from dataclasses import replace
from pathlib import Path

import torch

from megatron_dmc.checkpoint import CheckpointInfo, copy_tokenizer, save_checkpoint
from megatron_dmc.checkpoint.vocabulary import fill_added_rows
from megatron_dmc.checkpoint.weights import model_state
from megatron_dmc.config import ConfigError, DMCConfig
from megatron_dmc.convert.folders import check_companions, check_output, keep_special_tokens, new_folder, special_tokens
from megatron_dmc.convert.hf_config import read_config
from megatron_dmc.convert.mapping import to_megatron
from megatron_dmc.convert.single_process import empty_model, single_process
from megatron_dmc.convert.weights import Weights
from megatron_dmc.data.tokenizer import check_own_vocabulary, load_tokenizer
from megatron_dmc.model.model_config import ModelConfig
from megatron_dmc.recipe import CheckpointConfig, DataConfig, PhaseConfig, Recipe, TrainingConfig, check_head_dim
from megatron_dmc.recipe.base import MOST_ADDED_TOKENS

logger = logging.getLogger(__name__)


def import_hf(folder: str | Path, output: str | Path, *, pad_vocab_to_multiple_of: int = 1) -> None:
    """Writes a weights-only checkpoint, and with it the tokenizer; to load as ``checkpoint.load_base`` of a recipe.

    Weights keep their dtype. A plain model becomes a base, a DMC model keeps its decisions. One process, on the
    CPU; needs the model's size in memory once.

    Args:
        folder: config.json, safetensors and, if it has one, a tokenizer.
        output: must not exist, or be empty. It appears when it is whole.
        pad_vocab_to_multiple_of: 1 to MOST_ADDED_TOKENS; rows are added until their number is divisible by it, as tensor
            parallelism needs, see :func:`fill_added_rows`. A recipe's ``model.vocab_size`` counts them, an export leaves
            them out.

    Raises:
        ConfigError: the folder is incomplete or damaged, its model is not one that this package can represent, or
            ``pad_vocab_to_multiple_of`` is out of its range.
        CheckpointError: the checkpoint cannot be written.
    """
    folder, output = Path(folder), Path(output)
    check_output(output, folder)
    if not 1 <= pad_vocab_to_multiple_of <= MOST_ADDED_TOKENS:
        raise ConfigError(
            f"pad_vocab_to_multiple_of must be from 1 to {MOST_ADDED_TOKENS}, got {pad_vocab_to_multiple_of}"
        )
    model, dmc = read_config(folder)
    check_head_dim(model, dmc)
    weights = Weights.of(folder, model, dmc)
    check_companions(folder)
    if (folder / "tokenizer.json").is_file():
        check_own_vocabulary(load_tokenizer(folder), model.vocab_size)
    # What an export would refuse is refused now, not after the training.
    tokens = special_tokens(folder, model.vocab_size)
    padding = -model.vocab_size % pad_vocab_to_multiple_of
    vocabulary, model = model.vocab_size, replace(model, vocab_size=model.vocab_size + padding)

    with single_process(), new_folder(output) as temporary:
        network = empty_model(model, dmc, weights.dtype)
        parameters = dict(network.named_parameters())
        with torch.no_grad():
            for name, value in to_megatron(weights.finite, model, dmc):
                # The folder has no rows that pad the vocabulary.
                parameters.pop(name)[: len(value)].copy_(value)
        if parameters:
            raise RuntimeError(f"the mapping has no row for {', '.join(parameters)}")
        if padding:
            fill_added_rows([network], vocabulary)
        recipe = placeholder_recipe(model, dmc)
        info = CheckpointInfo(
            kind="weights",
            recipe=recipe.to_dict(),
            step=0,
            consumed_samples=0,
            phase=0,
            compression_ratio=None,
            vocabulary=vocabulary if padding else None,
        )
        save_checkpoint(temporary, "checkpoint", model_state([network]), info)
        for path in (temporary / "checkpoint").iterdir():
            path.rename(temporary / path.name)
        (temporary / "checkpoint").rmdir()
        copy_tokenizer(folder, temporary / "tokenizer")
        keep_special_tokens(temporary / "tokenizer", tokens, vocabulary)
    if not (output / "tokenizer" / "tokenizer.json").is_file():
        logger.warning(
            "warning: no tokenizer.json was copied, %s holds none: inspect and generate do not work with %s until a tokenizer "
            "is saved in %s with save_pretrained; a recipe's data.tokenizer names one of its own",
            *(folder, output, output / "tokenizer"),
        )


def placeholder_recipe(model: ModelConfig, dmc: DMCConfig | None) -> Recipe:
    """What a checkpoint tells of its run, where there was none: the model is real, one phase says whether it merges."""
    return Recipe(
        model=model,
        dmc=dmc or DMCConfig(),
        data=DataConfig(train=["none"], tokenizer="none", sequence_length=model.max_position_embeddings, cache="none"),
        phases=[PhaseConfig(kind="pretrain" if dmc is None else "compress", steps=1)],
        training=TrainingConfig(global_batch_size=1),
        checkpoint=CheckpointConfig(directory="none"),
    )
