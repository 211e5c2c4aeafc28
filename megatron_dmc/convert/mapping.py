"""Llama's tensors under Hugging Face's and megatron-core's names: one table, read in both directions."""

from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, replace

import torch
from torch import Tensor

from megatron_dmc.config import DMCConfig
from megatron_dmc.model.model_config import ModelConfig

Shape = tuple[int, ...]


@dataclass(frozen=True)
class Row:
    """One megatron-core parameter and the Hugging Face tensors that it is made of.

    Attributes:
        megatron, hugging_face: names; ``{layer}`` stands for the layer's number from 0.
        shapes: of the Hugging Face tensors.
        join: Hugging Face tensors -> the megatron-core parameter. Only moves elements, so it is exact in any dtype.
        split: the inverse of ``join``.
    """

    megatron: str
    hugging_face: tuple[str, ...]
    shapes: Callable[[ModelConfig], tuple[Shape, ...]]
    join: Callable[[Sequence[Tensor], ModelConfig], Tensor]
    split: Callable[[Tensor, ModelConfig], tuple[Tensor, ...]]

    def of_layer(self, layer: int) -> "Row":
        names = tuple(name.format(layer=layer) for name in self.hugging_face)
        return Row(self.megatron.format(layer=layer), names, self.shapes, self.join, self.split)


def _single(megatron: str, hugging_face: str, shape: Callable[[ModelConfig], Shape]) -> Row:
    """A row of one tensor that is the same in both."""
    return Row(megatron, (hugging_face,), lambda m: (shape(m),), lambda parts, m: parts[0], lambda whole, m: (whole,))


def _join_qkv(parts: Sequence[Tensor], model: ModelConfig) -> Tensor:
    """q, k, v [heads * head_dim, hidden] -> rows grouped per KV head: its query heads, then its k, then its v."""
    groups = [part.reshape(model.num_query_groups, -1, model.hidden_size) for part in parts]
    return torch.cat(groups, dim=1).reshape(-1, model.hidden_size)


def _split_qkv(whole: Tensor, model: ModelConfig) -> tuple[Tensor, ...]:
    queries = model.num_attention_heads // model.num_query_groups
    rows = [heads * model.head_dim for heads in (queries, 1, 1)]
    groups = whole.reshape(model.num_query_groups, sum(rows), model.hidden_size).split(rows, dim=1)
    return tuple(group.reshape(-1, model.hidden_size) for group in groups)


def _qkv_shapes(model: ModelConfig) -> tuple[Shape, ...]:
    query, key = model.num_attention_heads * model.head_dim, model.num_query_groups * model.head_dim
    return (query, model.hidden_size), (key, model.hidden_size), (key, model.hidden_size)


def _vector(model: ModelConfig) -> Shape:
    return (model.hidden_size,)


def _per_token(megatron: str, hugging_face: str) -> Row:
    """A row of one tensor [tokens, hidden]; megatron-core's may have more rows, which pad it."""
    return replace(
        _single(megatron, hugging_face, lambda m: (m.vocab_size, m.hidden_size)),
        split=lambda whole, m: (whole[: m.vocab_size],),
    )


_EMBEDDING = _per_token("embedding.word_embeddings.weight", "model.embed_tokens.weight")
_LAYER = (
    _single("decoder.layers.{layer}.input_layernorm.weight", "model.layers.{layer}.input_layernorm.weight", _vector),
    Row(
        "decoder.layers.{layer}.self_attention.linear_qkv.weight",
        (
            "model.layers.{layer}.self_attn.q_proj.weight",
            "model.layers.{layer}.self_attn.k_proj.weight",
            "model.layers.{layer}.self_attn.v_proj.weight",
        ),
        _qkv_shapes,
        _join_qkv,
        _split_qkv,
    ),
    _single(
        "decoder.layers.{layer}.self_attention.linear_proj.weight",
        "model.layers.{layer}.self_attn.o_proj.weight",
        lambda m: (m.hidden_size, m.num_attention_heads * m.head_dim),
    ),
    _single(
        "decoder.layers.{layer}.pre_mlp_layernorm.weight",
        "model.layers.{layer}.post_attention_layernorm.weight",
        _vector,
    ),
    Row(
        "decoder.layers.{layer}.mlp.linear_fc1.weight",
        ("model.layers.{layer}.mlp.gate_proj.weight", "model.layers.{layer}.mlp.up_proj.weight"),
        lambda m: ((m.ffn_hidden_size, m.hidden_size),) * 2,
        lambda parts, m: torch.cat(tuple(parts)),
        lambda whole, m: whole.chunk(2),
    ),
    _single(
        "decoder.layers.{layer}.mlp.linear_fc2.weight",
        "model.layers.{layer}.mlp.down_proj.weight",
        lambda m: (m.hidden_size, m.ffn_hidden_size),
    ),
)
# Only of decision_source ``projection``. Rows per KV head: its alpha logit, then its omega logit.
_DECISION = (
    _single(
        "decoder.layers.{layer}.self_attention.decision.weight",
        "model.layers.{layer}.self_attn.decision.weight",
        lambda m: (2 * m.num_query_groups, m.hidden_size),
    ),
    _single(
        "decoder.layers.{layer}.self_attention.decision.bias",
        "model.layers.{layer}.self_attn.decision.bias",
        lambda m: (2 * m.num_query_groups,),
    ),
)
_FINAL_NORM = _single("decoder.final_layernorm.weight", "model.norm.weight", _vector)
# Not where it is tied to the embedding.
_OUTPUT = _per_token("output_layer.weight", "lm_head.weight")


def rows(model: ModelConfig, dmc: DMCConfig | None) -> Iterator[Row]:
    """The table written out for one model; ``dmc`` None: the base model."""
    yield _EMBEDDING
    for layer in range(model.num_layers):
        decides = dmc is not None and dmc.has_projection
        for row in _LAYER + (_DECISION if decides else ()):
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
