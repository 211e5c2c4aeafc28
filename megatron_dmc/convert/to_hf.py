"""A checkpoint of this project -> a Hugging Face folder, whole or an adapter's."""

import contextlib
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

import torch

from megatron_dmc.checkpoint import (
    CheckpointError,
    CheckpointInfo,
    check_checkpoint,
    copy_tokenizer,
    load_checkpoint,
)
from megatron_dmc.checkpoint.metadata import read_metadata
from megatron_dmc.checkpoint.weights import (
    check_has_merged,
    is_base_weight,
    is_decision,
    load_weights,
    model_state,
    only_decisions,
    saved_recipe,
    set_model_state,
)
from megatron_dmc.config import ConfigError, DMCConfig
from megatron_dmc.convert.folders import (
    GENERATION_CONFIG,
    check_output,
    new_folder,
    special_tokens,
    write_json,
)
from megatron_dmc.convert.hf_config import write_config
from megatron_dmc.convert.mapping import hugging_face_shapes, rows, to_hugging_face
from megatron_dmc.convert.single_process import empty_model, single_process
from megatron_dmc.convert.weights import save_tensors, write_weights
from megatron_dmc.hf.adapter import ADAPTER_FILE
from megatron_dmc.hf.export import write_modeling_code
from megatron_dmc.recipe import Recipe


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
    halves of every ``linear_fc1`` anew when it loads.

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
    source = _open(Path(checkpoint), Path(output))
    model, dmc = source.recipe.model, source.dmc
    with _folder(source, Path(output), dtype) as temporary:
        network = empty_model(model, dmc, source.dtype)
        load_weights(source.checkpoint, [network], source.recipe, base)
        parameters = dict(network.named_parameters())
        write_weights(
            temporary,
            dict(hugging_face_shapes(model, dmc)),
            to_hugging_face(parameters.__getitem__, model, dmc),
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
    source = _open(Path(checkpoint), Path(output))
    if source.info.base is None:
        raise ConfigError(f"{checkpoint} is no adapter, it holds all its weights; export it without --adapter")
    model, dmc = source.recipe.model, source.dmc
    with _folder(source, Path(output), dtype) as temporary:
        network = empty_model(model, dmc, source.dtype)
        wanted = only_decisions(model_state([network]))
        set_model_state([network], load_checkpoint(source.checkpoint, wanted), is_base_weight)
        tensors: dict[str, torch.Tensor] = {}
        for row in rows(model, dmc):
            if is_decision(row.megatron):
                parts = row.split(network.get_parameter(row.megatron).detach(), model)
                tensors |= zip(row.hugging_face, (part.to(dtype or source.dtype) for part in parts), strict=True)
        save_tensors(tensors, temporary / ADAPTER_FILE)


@dataclass(frozen=True)
class _Source:
    """A checkpoint that can be exported. dtype: its weights'. dmc: None for a base model."""

    checkpoint: Path
    info: CheckpointInfo
    recipe: Recipe
    dmc: DMCConfig | None
    dtype: torch.dtype


def _open(checkpoint: Path, output: Path) -> _Source:
    check_output(output)
    info = check_checkpoint(checkpoint)
    recipe = saved_recipe(checkpoint, info)
    dmc = recipe.dmc if recipe.merges else None
    if dmc is not None:
        check_has_merged(checkpoint, recipe, info)
    return _Source(checkpoint, info, recipe, dmc, _stored_dtype(checkpoint))


@contextlib.contextmanager
def _folder(source: _Source, output: Path, dtype: torch.dtype | None) -> Iterator[Path]:
    """The new folder, which gets all but the weights."""
    tokens = special_tokens(source.checkpoint / "tokenizer", source.recipe.model.vocab_size)
    config = write_config(source.recipe.model, source.dmc, dtype=dtype or source.dtype, special_tokens=tokens)
    with single_process(), new_folder(output) as temporary:
        copy_tokenizer(source.checkpoint / "tokenizer", temporary)
        write_json(temporary / "config.json", config)
        if not (temporary / GENERATION_CONFIG).is_file():
            write_json(temporary / GENERATION_CONFIG, tokens)
        if source.dmc is not None:
            write_modeling_code(temporary)
        yield temporary


def _stored_dtype(checkpoint: Path) -> torch.dtype:
    """The embedding's, or of an adapter, which has none, the decisions'."""
    for name, entry in read_metadata(checkpoint / ".metadata").state_dict_metadata.items():
        # Not the optimizer's, whose names begin with its own.
        if name.startswith("embedding.word_embeddings.") or (name.startswith("decoder.") and is_decision(name)):
            dtype = getattr(getattr(entry, "properties", None), "dtype", None)
            if isinstance(dtype, torch.dtype) and dtype.is_floating_point:
                return dtype
    raise CheckpointError(f"checkpoint {checkpoint} holds no weights of a language model")
