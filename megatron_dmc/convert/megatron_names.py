"""Names of a Llama's weights in Megatron-LM's checkpoints, and how tensor-parallel ranks share each."""

import re
from collections.abc import Sequence

import torch
from torch import Tensor

# A name of ours -> the same weight as Transformer Engine's layers have it, with a norm in the linear layer after it.
_FUSED = (
    (".input_layernorm.weight", ".self_attention.linear_qkv.layer_norm_weight"),
    (".pre_mlp_layernorm.weight", ".mlp.linear_fc1.layer_norm_weight"),
)
# A name of ours -> the same weight as the models before megatron-core had it (--use-legacy-models).
_LEGACY = (
    ("embedding.word_embeddings.weight", "language_model.embedding.word_embeddings.weight"),
    ("output_layer.weight", "language_model.output_layer.weight"),
    ("decoder.final_layernorm.weight", "language_model.encoder.final_norm.weight"),
    ("decoder.layers.", "language_model.encoder.layers."),
    (".input_layernorm.weight", ".input_norm.weight"),
    (".pre_mlp_layernorm.weight", ".post_attention_norm.weight"),
    (".linear_qkv.", ".query_key_value."),
    (".linear_proj.", ".dense."),
    (".linear_fc1.", ".dense_h_to_4h."),
    (".linear_fc2.", ".dense_4h_to_h."),
)
# Beside the weights: FP8 scales of Transformer Engine, and the rotary frequencies, which follow from the arguments.
_NO_WEIGHT = re.compile(r".*(\._extra_state|rotary_pos_emb\.inv_freq)")

_BY_ROWS = ("word_embeddings.weight", "output_layer.weight", "linear_qkv.weight", "linear_qkv.bias")
_BY_COLUMNS = ("linear_proj.weight", "linear_fc2.weight")
_GATED = ("linear_fc1.weight",)


def is_weight(name: str) -> bool:
    return not _NO_WEIGHT.fullmatch(name)


def spellings(name: str) -> tuple[str, ...]:
    """Under which names a checkpoint may hold one of our parameters: as it is, fused, or legacy."""
    return name, _replaced(name, _FUSED), _replaced(name, _LEGACY)


def _replaced(name: str, table: Sequence[tuple[str, str]]) -> str:
    for ours, theirs in table:
        name = name.replace(ours, theirs)
    return name


def shape_of_rank(name: str, shape: Sequence[int], ranks: int) -> tuple[int, ...]:
    """A parameter's shape on one of so many tensor-parallel ranks.

    Args:
        name: ours.
        shape: of the whole.
    """
    first, *rest = shape
    if name.endswith(_BY_ROWS + _GATED):
        return (first // ranks, *rest)
    return (first, rest[0] // ranks) if name.endswith(_BY_COLUMNS) else tuple(shape)


def join(name: str, parts: Sequence[Tensor]) -> Tensor | None:
    """The whole parameter of every rank's part; None where all should have the same and do not.

    Args:
        name: ours.
    """
    if len(parts) == 1:
        return parts[0]
    if name.endswith(_BY_ROWS):
        return torch.cat(tuple(parts))
    if name.endswith(_BY_COLUMNS):
        return torch.cat(tuple(parts), dim=1)
    if name.endswith(_GATED):
        # Every rank has its share of the gate, and then its share of the other half.
        halves = [part.chunk(2) for part in parts]
        return torch.cat([half[i] for i in range(2) for half in halves])
    return parts[0] if all(torch.equal(part, parts[0]) for part in parts) else None
