"""A checkpoint of this project -> a Hugging Face folder."""

import json
from pathlib import Path
from typing import Any

import torch

from megatron_dmc.config import ConfigError
from megatron_dmc.convert.folders import (
    GENERATION_CONFIG,
    SPECIAL_TOKENS,
    check_output,
    copy_tokenizer,
    new_folder,
    special_tokens,
)
from megatron_dmc.convert.hf_config import write_config
from megatron_dmc.convert.mapping import hugging_face_shapes, to_hugging_face
from megatron_dmc.convert.single_process import empty_model, single_process
from megatron_dmc.convert.weights import write_weights
from megatron_dmc.hf.export import write_modeling_code
from megatron_dmc.training.arguments import recipe_from_dict
from megatron_dmc.training.checkpoint import CheckpointError, check_checkpoint, load_checkpoint
from megatron_dmc.training.checkpoint_metadata import read_metadata
from megatron_dmc.training.weights import is_dmc_checkpoint, model_state, set_model_state


def export_hf(
    checkpoint: str | Path,
    output: str | Path,
    *,
    dtype: torch.dtype | None = None,
    max_shard_size: int = 5_000_000_000,
) -> None:
    """Writes config.json, safetensors, the tokenizer's files and, for a model that merges, its modeling code.

    A base model becomes a plain ``LlamaForCausalLM``; one that merges a ``DMCLlamaForCausalLM``, which
    ``AutoModelForCausalLM.from_pretrained(output, trust_remote_code=True)`` loads. One process, on the CPU; needs the
    model's size in memory one and a half times: megatron-core joins the halves of every ``linear_fc1`` anew when it loads.

    Args:
        checkpoint: one checkpoint folder, of any layout, full or weights only.
        output: must not exist, or be empty. It appears when it is whole.
        dtype: of the written weights; None: as in the checkpoint.
        max_shard_size: bytes in one safetensors file.

    Raises:
        ConfigError, CheckpointError: the checkpoint is damaged, or the output cannot be written.
    """
    checkpoint, output = Path(checkpoint), Path(output)
    if max_shard_size < 1:
        raise ConfigError(f"max_shard_size must be >= 1 byte, got {max_shard_size}")
    check_output(output)
    info = check_checkpoint(checkpoint)
    recipe = recipe_from_dict(info.recipe)
    model, dmc = recipe.model, recipe.dmc if is_dmc_checkpoint(info) else None
    if dmc is not None and all(phase.kind in ("pretrain", "zero_out") for phase in recipe.phases[: info.phase + 1]):
        raise ConfigError(f"{checkpoint} was saved before its run began to merge; name a later checkpoint")
    stored = _stored_dtype(checkpoint)
    tokens = special_tokens(checkpoint / "tokenizer")
    config = write_config(model, dmc, dtype=dtype or stored, special_tokens=tokens)
    with single_process(), new_folder(output) as temporary:
        network = empty_model(model, dmc, stored)
        set_model_state([network], load_checkpoint(checkpoint, model_state([network])))
        parameters = dict(network.named_parameters())
        write_weights(
            temporary,
            dict(hugging_face_shapes(model, dmc)),
            to_hugging_face(parameters.__getitem__, model, dmc),
            dtype=dtype or stored,
            max_shard_size=max_shard_size,
        )
        copy_tokenizer(checkpoint / "tokenizer", temporary)
        _write_json(temporary / "config.json", config)
        if not (temporary / GENERATION_CONFIG).is_file():
            _write_json(
                temporary / GENERATION_CONFIG, {name: tokens[name] for name in SPECIAL_TOKENS if name in tokens}
            )
        if dmc is not None:
            write_modeling_code(temporary)


def _stored_dtype(checkpoint: Path) -> torch.dtype:
    entry = read_metadata(checkpoint / ".metadata").state_dict_metadata.get("embedding.word_embeddings.weight")
    dtype = getattr(getattr(entry, "properties", None), "dtype", None)
    if not isinstance(dtype, torch.dtype) or not dtype.is_floating_point:
        raise CheckpointError(f"checkpoint {checkpoint} holds no weights of a language model")
    return dtype


def _write_json(path: Path, content: dict[str, Any]) -> None:
    path.write_text(json.dumps(content, indent=2) + "\n", encoding="utf-8")
