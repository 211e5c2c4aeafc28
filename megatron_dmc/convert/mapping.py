"""A model's tensors under Hugging Face's and megatron-core's names: one table, read in both directions."""

from collections.abc import Callable, Iterator

import torch
from torch import Tensor

from megatron_dmc.config import DMCConfig
from megatron_dmc.convert.families import FAMILIES
from megatron_dmc.convert.rows import Row, Shape, per_token, qkv, single, vector
from megatron_dmc.model.model_config import ModelConfig

_EMBEDDING = per_token("embedding.word_embeddings.weight", "model.embed_tokens.weight")
_LAYER = (
    single("decoder.layers.{layer}.input_layernorm.weight", "model.layers.{layer}.input_layernorm.weight", vector),
    qkv("weight"),
    single(
        "decoder.layers.{layer}.self_attention.linear_proj.weight",
        "model.layers.{layer}.self_attn.o_proj.weight",
        lambda m: (m.hidden_size, m.num_attention_heads * m.head_dim),
    ),
    single(
        "decoder.layers.{layer}.pre_mlp_layernorm.weight",
        "model.layers.{layer}.post_attention_layernorm.weight",
        vector,
    ),
    Row(
        "decoder.layers.{layer}.mlp.linear_fc1.weight",
        ("model.layers.{layer}.mlp.gate_proj.weight", "model.layers.{layer}.mlp.up_proj.weight"),
        lambda m: ((m.ffn_hidden_size, m.hidden_size),) * 2,
        lambda parts, m: torch.cat(tuple(parts)),
        lambda whole, m: whole.chunk(2),
    ),
    single(
        "decoder.layers.{layer}.mlp.linear_fc2.weight",
        "model.layers.{layer}.mlp.down_proj.weight",
        lambda m: (m.hidden_size, m.ffn_hidden_size),
    ),
)
# Only of decision_source ``projection``. Rows per KV head: its alpha logit, then its omega logit.
_DECISION = (
    single(
        "decoder.layers.{layer}.self_attention.decision.weight",
        "model.layers.{layer}.self_attn.decision.weight",
        lambda m: (2 * m.num_query_groups, m.hidden_size),
    ),
    single(
        "decoder.layers.{layer}.self_attention.decision.bias",
        "model.layers.{layer}.self_attn.decision.bias",
        lambda m: (2 * m.num_query_groups,),
    ),
)
_FINAL_NORM = single("decoder.final_layernorm.weight", "model.norm.weight", vector)
# Not where it is tied to the embedding.
_OUTPUT = per_token("output_layer.weight", "lm_head.weight")


def rows(model: ModelConfig, dmc: DMCConfig | None) -> Iterator[Row]:
    """The table written out for one model; ``dmc`` None: the base model."""
    family = FAMILIES[model.family]
    yield _EMBEDDING
    for layer in range(model.num_layers):
        decides = dmc is not None and dmc.has_projection
        for row in (*_LAYER, *family.rows, *(_DECISION if decides else ())):
            yield row.of_layer(layer)
    yield _FINAL_NORM
    if not model.share_embeddings_and_output_weights:
        yield _OUTPUT


def hugging_face_shapes(model: ModelConfig, dmc: DMCConfig | None) -> Iterator[tuple[str, Shape]]:
    """Name and shape of every tensor of the Hugging Face model, in the order of :func:`to_hugging_face`."""
    for row in rows(model, dmc):
        yield from zip(row.hugging_face, row.shapes(model), strict=True)


def to_megatron(
    get: Callable[[str], Tensor], model: ModelConfig, dmc: DMCConfig | None
) -> Iterator[tuple[str, Tensor]]:
    """megatron-core's parameters by name, one at a time, from ``get`` (a Hugging Face name -> its tensor)."""
    for row in rows(model, dmc):
        yield row.megatron, row.join([get(name) for name in row.hugging_face], model)


def to_hugging_face(
    get: Callable[[str], Tensor], model: ModelConfig, dmc: DMCConfig | None
) -> Iterator[tuple[str, Tensor]]:
    """Hugging Face tensors by name, one row at a time, from ``get`` (a megatron-core name -> its parameter)."""
    for row in rows(model, dmc):
        yield from zip(row.hugging_face, row.split(get(row.megatron), model), strict=True)
