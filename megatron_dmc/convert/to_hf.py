"""A checkpoint of this project -> a Hugging Face folder, whole or an adapter's."""

import contextlib
import logging
from collections.abc import Iterator
from dataclasses import replace
from functools import partial
from pathlib import Path

import torch

from megatron_dmc.checkpoint import CheckpointError, SavedModel, copy_tokenizer
from megatron_dmc.checkpoint.weights import adapter_may_lack, is_decision, model_state, only_decisions, set_model_state
from megatron_dmc.config import ConfigError, DMCConfig
from megatron_dmc.convert.families import FAMILIES
from megatron_dmc.convert.folders import (
    GENERATION_CONFIG,
    check_companions,
    check_output,
    new_folder,
    special_tokens,
    take_tokenizer_as_it_is,
    write_json,
)
from megatron_dmc.convert.hf_config import write_config
from megatron_dmc.convert.mapping import hugging_face_shapes, rows, to_hugging_face
from megatron_dmc.convert.single_process import empty_model, single_process
from megatron_dmc.convert.weights import save_tensors, write_weights
from megatron_dmc.hf.adapter import ADAPTER_FILE
from megatron_dmc.hf.export import write_modeling_code
from megatron_dmc.model.decision_projection import DecisionProjection, is_buffer
from megatron_dmc.model.model_config import ModelConfig

logger = logging.getLogger(__name__)

# Any of them is a tokenizer to transformers.
_TOKENIZERS = ("tokenizer.json", "tokenizer.model", "vocab.json", "vocab.txt")


def export_hf(
    checkpoint: str | Path,
    output: str | Path,
    *,
    dtype: torch.dtype | None = None,
    max_shard_size: int = 5_000_000_000,
    base: str | Path | None = None,
) -> None:
    """Writes config.json, safetensors, the tokenizer's files and, for a model that merges, its modeling code.

    A base model becomes a plain ``LlamaForCausalLM``; one that merges a ``DMCLlamaForCausalLM``, which
    ``AutoModelForCausalLM.from_pretrained(output, trust_remote_code=True)`` loads; an adapter with its base's weights is
    one of these. One process, on the CPU; needs the model's size in memory one and a half times: megatron-core joins the
    halves of every ``linear_fc1`` anew when it loads. Rows that pad the vocabulary are left out.

    Args:
        checkpoint: one checkpoint folder, of any layout, full or weights only.
        output: must not exist, or be empty. It appears when it is whole.
        dtype: of the written weights; None: as in the checkpoint (an adapter's own: it was trained on its base in that).
        max_shard_size: bytes in one safetensors file.
        base: where an adapter's base is now; None: where it was.

    Raises:
        ConfigError, CheckpointError: the checkpoint is damaged, or the output cannot be written.
    """
    if max_shard_size < 1:
        raise ConfigError(f"max_shard_size must be >= 1 byte, got {max_shard_size}")
    with _export(checkpoint, output, dtype, base) as (source, model, temporary):
        dmc = source.dmc
        network = empty_model(source.recipe.model, dmc, source.dtype)
        source.load_into([network])
        write_weights(
            temporary,
            dict(hugging_face_shapes(model, dmc)),
            to_hugging_face(partial(_weight, network, dmc), model, dmc),
            dtype=dtype or source.dtype,
            max_shard_size=max_shard_size,
        )


def export_adapter(checkpoint: str | Path, output: str | Path, *, dtype: torch.dtype | None = None) -> None:
    """Writes what an adapter's checkpoint has learned, ``adapter.safetensors``, and all else that its model needs.

    ``AutoModelForCausalLM.from_pretrained(output, base=llama, trust_remote_code=True)`` loads it together with the base's
    Hugging Face folder. The base's checkpoint is not needed.

    Args:
        checkpoint, output, dtype: as :func:`export_hf`'s.

    Raises:
        ConfigError, CheckpointError: as :func:`export_hf`; and a checkpoint that is no adapter.
    """
    with _export(checkpoint, output, dtype, must_be_adapter=True) as (source, model, temporary):
        _check_fits_its_base(source)
        dmc = source.dmc
        network = empty_model(model, dmc, source.dtype)
        wanted = only_decisions(model_state([network]))
        set_model_state([network], source.load(wanted, may_be_missing=is_buffer), adapter_may_lack)
        tensors: dict[str, torch.Tensor] = {}
        for row in rows(model, dmc):
            if is_decision(row.megatron):
                parts = row.split(_weight(network, dmc, row.megatron), model)
                tensors |= zip(row.hugging_face, (part.to(dtype or source.dtype) for part in parts), strict=True)
        save_tensors(tensors, temporary / ADAPTER_FILE)


def _weight(network: torch.nn.Module, dmc: DMCConfig | None, name: str) -> torch.Tensor:
    """A weight as an exported model has it: the decision projection's for its input as it is."""
    module, _, kind = name.rpartition(".")
    projection = network.get_submodule(module)
    if isinstance(projection, DecisionProjection) and dmc is not None:
        return projection.effective_weight if kind == "weight" else projection.effective_bias(dmc.decision_scale)
    return network.get_parameter(name).detach()


def _check_fits_its_base(adapter: SavedModel) -> None:
    """Raises ConfigError for an adapter with tokens that its base lacks, as far as the base is here to be asked."""
    base = None
    with contextlib.suppress(CheckpointError):
        base = adapter.base
    if base is not None and base.vocabulary != adapter.vocabulary:
        raise ConfigError(
            f"{adapter.folder} has {adapter.vocabulary} tokens, its base {base.vocabulary}: by itself the adapter would fit "
            "no base; export it without --adapter"
        )


@contextlib.contextmanager
def _export(
    checkpoint: str | Path,
    output: str | Path,
    dtype: torch.dtype | None,
    base: str | Path | None = None,
    *,
    must_be_adapter: bool = False,
) -> Iterator[tuple[SavedModel, ModelConfig, Path]]:
    """The checkpoint, opened, what its model is without padding, and the new folder, which gets all but the weights.

    In a world of this one process.
    """
    output = Path(output)
    check_output(output)
    with single_process():
        source = SavedModel.open(checkpoint, base)
        if must_be_adapter and not source.is_adapter:
            raise ConfigError(f"{checkpoint} is no adapter, it holds all its weights; export it without --adapter")
        if source.merges:
            source.check_has_merged()
        check_companions(source.tokenizer)
        model = replace(source.recipe.model, vocab_size=source.vocabulary)
        tokens = special_tokens(source.tokenizer, model.vocab_size)
        config = write_config(model, source.dmc, dtype=dtype or source.dtype, special_tokens=tokens)
        with new_folder(output) as temporary:
            copy_tokenizer(source.tokenizer, temporary)
            write_json(temporary / "config.json", config)
            if not (temporary / GENERATION_CONFIG).is_file():
                write_json(temporary / GENERATION_CONFIG, tokens)
            if source.merges:
                write_modeling_code(temporary)
                if FAMILIES[model.family].plain_tokenizer:
                    take_tokenizer_as_it_is(temporary)
            yield source, model, temporary
        if not any((output / name).is_file() for name in _TOKENIZERS):
            logger.warning(
                "warning: no tokenizer was copied, %s holds none: AutoTokenizer.from_pretrained does not work with %s until a "
                "tokenizer is saved there with save_pretrained",
                *(source.folder, output),
            )
