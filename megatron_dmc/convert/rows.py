"""One megatron-core parameter and the Hugging Face tensors that it is made of: what the table of names consists of."""

from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace

import torch
from torch import Tensor

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


def single(megatron: str, hugging_face: str, shape: Callable[[ModelConfig], Shape]) -> Row:
    """A row of one tensor that is the same in both."""
    return Row(megatron, (hugging_face,), lambda m: (shape(m),), lambda parts, m: parts[0], lambda whole, m: (whole,))


def qkv(kind: str) -> Row:
    """linear_qkv's weight [(heads + 2 kv_heads) * head_dim, hidden] or bias, of three tensors.

    Args:
        kind: weight or bias.
    """
    names = tuple(f"model.layers.{{layer}}.self_attn.{name}_proj.{kind}" for name in "qkv")
    inner = (lambda m: (m.hidden_size,)) if kind == "weight" else lambda m: ()
    return Row(
        f"decoder.layers.{{layer}}.self_attention.linear_qkv.{kind}",
        names,
        lambda m: tuple((heads * m.head_dim, *inner(m)) for heads in _heads(m)),
        _join_qkv,
        _split_qkv,
    )


def _heads(model: ModelConfig) -> tuple[int, int, int]:
    return model.num_attention_heads, model.num_query_groups, model.num_query_groups


def _join_qkv(parts: Sequence[Tensor], model: ModelConfig) -> Tensor:
    """q, k, v, each [heads * head_dim, ...] -> rows grouped per KV head: its query heads, then its k, then its v."""
    inner = parts[0].shape[1:]
    groups = [part.reshape(model.num_query_groups, -1, *inner) for part in parts]
    return torch.cat(groups, dim=1).reshape(-1, *inner)


def _split_qkv(whole: Tensor, model: ModelConfig) -> tuple[Tensor, ...]:
    inner = whole.shape[1:]
    rows = [heads // model.num_query_groups * model.head_dim for heads in _heads(model)]
    groups = whole.reshape(model.num_query_groups, sum(rows), *inner).split(rows, dim=1)
    return tuple(group.reshape(-1, *inner) for group in groups)


def vector(model: ModelConfig) -> Shape:
    return (model.hidden_size,)


def per_token(megatron: str, hugging_face: str) -> Row:
    """A row of one tensor [tokens, hidden]; megatron-core's may have more rows, which pad it."""
    return replace(
        single(megatron, hugging_face, lambda m: (m.vocab_size, m.hidden_size)),
        split=lambda whole, m: (whole[: m.vocab_size],),
    )
