"""A checkpoint of this project -> a Hugging Face folder, whole or an adapter's."""

import contextlib
import logging
import math
from collections.abc import Callable, Iterator
from dataclasses import replace
from pathlib import Path

import torch

from megatron_dmc.checkpoint import CheckpointError, SavedModel, copy_tokenizer
from megatron_dmc.checkpoint.in_turn import load_decisions, weights_in_turn
from megatron_dmc.checkpoint.weights import is_decision
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
from megatron_dmc.convert.progress import Written, progress
from megatron_dmc.convert.safetensors_file import is_finite
from megatron_dmc.convert.single_process import shapes_only, single_process
from megatron_dmc.convert.weights import Weights, save_tensors, write_weights
from megatron_dmc.hf.adapter import ADAPTER_FILE
from megatron_dmc.hf.export import write_modeling_code
from megatron_dmc.model.decision_projection import DecisionProjection
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
) -> Written:
    """Writes config.json, safetensors, the tokenizer's files and, for a model that merges, its modeling code.

    A base model becomes a plain one of its family, a ``LlamaForCausalLM``; one that merges a ``DMCLlamaForCausalLM``, which
    ``AutoModelForCausalLM.from_pretrained(output, trust_remote_code=True)`` loads; an adapter with its base's weights is
    one of these. One process, on the CPU; weights pass one after the other: the largest needs memory twice, whatever the
    model's size. Rows that pad the vocabulary are left out.

    Args:
        checkpoint: one checkpoint folder, of any layout, full or weights only.
        output: must not exist, or be empty. It appears when it is whole.
        dtype: of the written weights; None: as in the checkpoint (an adapter's own: it was trained on its base in that).
        max_shard_size: bytes in one safetensors file.
        base: where an adapter's base is now; None: where it was.

    Raises:
        ConfigError, CheckpointError: the checkpoint is damaged, its weights are not finite, or the output cannot be written.
    """
    if max_shard_size < 1:
        raise ConfigError(f"max_shard_size must be >= 1 byte, got {max_shard_size}")
    with _export(checkpoint, output, dtype, base) as (source, model, temporary):
        shapes = dict(hugging_face_shapes(model, source.dmc))
        written = Written(len(shapes), sum(map(math.prod, shapes.values())) * (dtype or source.dtype).itemsize)
        with progress(f"writing {output}", written.bytes) as advance:
            write_weights(
                temporary,
                shapes,
                to_hugging_face(_weights(source, dtype), model, source.dmc),
                dtype=dtype or source.dtype,
                max_shard_size=max_shard_size,
                advance=advance,
            )
        # Reads the files' headers, and compares their sizes.
        Weights(temporary).check(shapes.items())
    return written


def export_adapter(checkpoint: str | Path, output: str | Path, *, dtype: torch.dtype | None = None) -> Written:
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
        get = _weights(source, dtype)
        tensors: dict[str, torch.Tensor] = {}
        for row in rows(model, source.dmc):
            if is_decision(row.megatron):
                parts = row.split(get(row.megatron), model)
                tensors |= zip(row.hugging_face, (part.to(dtype or source.dtype) for part in parts), strict=True)
        save_tensors(tensors, temporary / ADAPTER_FILE)
    return Written(len(tensors), sum(tensor.nbytes for tensor in tensors.values()))


def _weights(source: SavedModel, dtype: torch.dtype | None) -> Callable[[str], torch.Tensor]:
    """A function of megatron-core's names that gives a checkpoint's weights as an exported model has them.

    It must be asked in the order of the mapping's rows; decisions may be asked for by themselves. Raises CheckpointError for
    one that is damaged, or not finite, also in the dtype that is written.
    """
    model, dmc = source.recipe.model, source.dmc
    network = shapes_only(model, dmc, source.dtype)
    if dmc is not None and dmc.has_projection:
        load_decisions(source, network)
    names = [row.megatron for row in rows(model, dmc) if not is_decision(row.megatron)]
    others = weights_in_turn(source, network, names)

    def get(name: str) -> torch.Tensor:
        if is_decision(name) and dmc is not None:
            found, value = name, _decision(network, dmc, name)
        else:
            found, value = next(others)
        if found != name:
            raise RuntimeError(f"{found} came where {name} was asked for")
        if is_finite(value, dtype):
            return value
        if is_finite(value):
            raise ConfigError(f"{source.folder}: {name} has values that {dtype} cannot hold; ask for another --dtype")
        raise CheckpointError(
            f"{source.folder}: {name} is not finite everywhere; its run has diverged, name an earlier checkpoint"
        )

    return get


def _decision(network: torch.nn.Module, dmc: DMCConfig, name: str) -> torch.Tensor:
    """A weight of a decision projection for its input as it is."""
    module, _, kind = name.rpartition(".")
    projection = network.get_submodule(module)
    if not isinstance(projection, DecisionProjection):
        raise TypeError(f"{module} is no decision projection")
    return projection.effective_weight if kind == "weight" else projection.effective_bias(dmc.decision_scale)


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
