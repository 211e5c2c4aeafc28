"""Weights from Hugging Face's layout to Megatron's and back, bit by bit."""

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from safetensors.torch import load_file

from megatron_dmc.config import DMCConfig
from megatron_dmc.convert.families import FAMILIES
from megatron_dmc.convert.mapping import hugging_face_shapes, rows, to_hugging_face, to_megatron
from megatron_dmc.convert.single_process import empty_model
from megatron_dmc.model.model_config import ModelConfig

DTYPES = (torch.float64, torch.float32, torch.float16, torch.bfloat16)


def random_tensor(shape: tuple[int, ...], dtype: torch.dtype) -> torch.Tensor:
    """Any bits at all: NaN, infinities, denormals."""
    return torch.randint(-128, 128, (*shape, dtype.itemsize), dtype=torch.int8).view(dtype).squeeze(-1)


def bits(tensor: torch.Tensor) -> bytes:
    return tensor.contiguous().view(torch.int8).numpy().tobytes()


@settings(max_examples=25, deadline=None)
@given(
    groups=st.integers(1, 3),
    queries=st.integers(1, 3),
    head_dim=st.sampled_from([2, 6]),
    tied=st.booleans(),
    family=st.sampled_from(sorted(FAMILIES)),
    source=st.sampled_from([None, "neuron", "projection"]),
    dtype=st.sampled_from(DTYPES),
)
def test_the_round_trip_keeps_every_bit(
    groups: int, queries: int, head_dim: int, tied: bool, family: Any, source: str | None, dtype: torch.dtype
) -> None:
    model = ModelConfig(
        num_layers=2,
        hidden_size=5,
        ffn_hidden_size=7,
        num_attention_heads=groups * queries,
        num_query_groups=groups,
        vocab_size=11,
        max_position_embeddings=16,
        kv_channels=head_dim,
        share_embeddings_and_output_weights=tied,
        family=family,
    )
    dmc = None if source is None else DMCConfig(decision_source=source)  # type: ignore[arg-type]
    before = {name: random_tensor(shape, dtype) for name, shape in hugging_face_shapes(model, dmc)}
    megatron = dict(to_megatron(before.__getitem__, model, dmc))
    after = dict(to_hugging_face(megatron.__getitem__, model, dmc))
    assert list(after) == list(before)
    for name, tensor in before.items():
        assert after[name].dtype == dtype and after[name].shape == tensor.shape
        assert bits(after[name]) == bits(tensor), name


def test_rows_of_linear_qkv_are_grouped_per_kv_head() -> None:
    model = ModelConfig(
        num_layers=1,
        hidden_size=4,
        ffn_hidden_size=3,
        num_attention_heads=6,
        num_query_groups=2,
        vocab_size=5,
        max_position_embeddings=8,
        kv_channels=2,
    )
    row = next(row for row in rows(model, None) if "linear_qkv" in row.megatron)
    q, k, v = (torch.randn(shape) for shape in row.shapes(model))
    whole = row.join([q, k, v], model)
    expected = torch.cat([q[:6], k[:2], v[:2], q[6:], k[2:], v[2:]])
    assert torch.equal(whole, expected)


@pytest.mark.parametrize("tied", [False, True], ids=["untied", "tied"])
@pytest.mark.parametrize("family", FAMILIES)
def test_every_name_is_mapped(save_llama: Callable[..., Path], family: Any, tied: bool) -> None:
    folder = save_llama(family=family, tie_word_embeddings=tied, head_dim=16)
    model = ModelConfig(
        2, 32, 48, 4, 2, 300, 128, kv_channels=16, share_embeddings_and_output_weights=tied, family=family
    )
    dmc = DMCConfig(decision_source="projection")
    saved = load_file(folder / "model.safetensors")
    assert {name: tuple(tensor.shape) for name, tensor in saved.items()} == dict(hugging_face_shapes(model, None))
    zeros = {name: torch.zeros(shape) for name, shape in hugging_face_shapes(model, dmc)}
    mapped = {name: tensor.shape for name, tensor in to_megatron(zeros.__getitem__, model, dmc)}
    network = empty_model(model, dmc, torch.float32)
    assert mapped == {name: parameter.shape for name, parameter in network.named_parameters()}
