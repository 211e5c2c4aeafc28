"""A Hugging Face folder -> a checkpoint of this project."""

import logging
from pathlib import Path

from megatron_dmc.checkpoint import copy_tokenizer
from megatron_dmc.config import ConfigError
from megatron_dmc.convert.folders import check_companions, check_output, keep_special_tokens, new_folder, special_tokens
from megatron_dmc.convert.hf_config import check_exportable, read_config, read_json
from megatron_dmc.convert.progress import Written
from megatron_dmc.convert.single_process import single_process
from megatron_dmc.convert.to_checkpoint import check_multiple, write_model
from megatron_dmc.convert.weights import Weights
from megatron_dmc.data.tokenizer import check_own_vocabulary, load_tokenizer
from megatron_dmc.recipe import check_head_dim

logger = logging.getLogger(__name__)


def import_hf(folder: str | Path, output: str | Path, *, pad_vocab_to_multiple_of: int = 1) -> Written:
    """Writes a weights-only checkpoint, and with it the tokenizer; to load as ``checkpoint.load_base`` of a recipe.

    Weights keep their dtype. A plain model becomes a base, a DMC model keeps its decisions. One process, on the
    CPU; weights pass one after the other: the largest needs memory twice, whatever the model's size.

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
    check_multiple(pad_vocab_to_multiple_of)
    model, dmc = read_config(folder)
    # Each with the value that says nothing.
    for name, nothing in (("merge_threshold", "0"), ("cache_dtype", "null")):
        if value := read_json(folder / "config.json").get(name):
            raise ConfigError(
                f"{folder / 'config.json'}: {name} is {value!r}, which a checkpoint has no place for; set it to {nothing}, "
                "and choose it again in the next export"
            )
    check_head_dim(model, dmc)
    check_exportable(model)
    weights = Weights.of(folder, model, dmc)
    check_companions(folder)
    if (folder / "tokenizer.json").is_file():
        check_own_vocabulary(load_tokenizer(folder), model.vocab_size)
    # What an export would refuse is refused now, not after the training.
    tokens = special_tokens(folder, model.vocab_size)

    with single_process(), new_folder(output) as temporary:
        written = write_model(
            temporary,
            lambda row: row.join([weights.finite(name).to(weights.dtype) for name in row.hugging_face], model),
            model,
            dmc,
            dtype=weights.dtype,
            pad_vocab_to_multiple_of=pad_vocab_to_multiple_of,
        )
        copy_tokenizer(folder, temporary / "tokenizer")
        keep_special_tokens(temporary / "tokenizer", tokens, model.vocab_size)
    warn_without_tokenizer(folder, output)
    return written


def warn_without_tokenizer(source: Path, output: Path) -> None:
    """Says what does not work with a checkpoint that got no tokenizer."""
    if not (output / "tokenizer" / "tokenizer.json").is_file():
        logger.warning(
            "warning: no tokenizer.json was copied, %s holds none: inspect and generate do not work with %s until a tokenizer "
            "is saved in %s with save_pretrained; a recipe's data.tokenizer names one of its own",
            *(source, output, output / "tokenizer"),
        )
