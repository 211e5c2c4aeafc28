"""Checkpoints of the form that Megatron-LM writes and the paper's authors have released, of a random tiny model."""

import io
import random
from argparse import Namespace
from collections import OrderedDict
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import numpy
import torch
from megatron.core.enums import ModelType
from torch import Tensor

from megatron_dmc.config import PAPER_OMEGA_FLOOR, DMCConfig
from megatron_dmc.convert.single_process import empty_model
from megatron_dmc.model.model_config import ModelConfig

SIZES = ModelConfig(
    num_layers=2,
    hidden_size=32,
    ffn_hidden_size=48,
    num_attention_heads=4,
    num_query_groups=2,
    vocab_size=304,
    max_position_embeddings=128,
)
# What the authors' inference computes with their defaults.
AUTHORS = DMCConfig(decision_source="neuron", decision_bias=5.0, window_size=12, omega_floor=PAPER_OMEGA_FLOOR)


def random_parameters(model: ModelConfig = SIZES, dtype: torch.dtype = torch.bfloat16) -> dict[str, Tensor]:
    """By our names; so many tokens merge that slots of more than 12 are common."""
    torch.manual_seed(7)
    network = empty_model(model, None, dtype)
    found = {}
    for name, parameter in network.named_parameters():
        with torch.no_grad():
            parameter.uniform_(0.5, 1.5) if "norm" in name else parameter.normal_(std=0.2)
            if name.endswith("linear_qkv.weight"):
                groups = parameter.view(model.num_query_groups, -1, model.head_dim, model.hidden_size)
                # The last channel of the key, before the value.
                groups[:, -2, -1].normal_(0.4)
            if name.startswith("embedding"):
                parameter += 0.3
        found[name] = parameter.detach()
    return found


def arguments(model: ModelConfig = SIZES, **overrides: Any) -> Namespace:
    """Those of the authors' runs that say what the model is, and some that do not."""
    values = {
        "num_layers": model.num_layers,
        "hidden_size": model.hidden_size,
        "ffn_hidden_size": model.ffn_hidden_size,
        "num_attention_heads": model.num_attention_heads,
        "group_query_attention": model.num_query_groups != model.num_attention_heads,
        "num_query_groups": model.num_query_groups,
        "kv_channels": model.head_dim,
        "padded_vocab_size": model.vocab_size,
        "max_position_embeddings": model.max_position_embeddings,
        "norm_epsilon": model.norm_epsilon,
        "normalization": "RMSNorm",
        "position_embedding_type": "rope",
        "swiglu": True,
        "add_bias_linear": False,
        "untie_embeddings_and_output_weights": not model.share_embeddings_and_output_weights,
        "tensor_model_parallel_size": 1,
        "pipeline_model_parallel_size": 1,
        "params_dtype": torch.bfloat16,
        "model_type": ModelType.encoder_or_decoder,
        "data_path": ["0.5", "text"],
        "dmc_init_val": 5.0,
        "dmc_window_size": 12,
        "dmc_temp": 0.1,
        "dmc_cr": 8.0,
        "dmc_finetune": True,
        "dmc_is_stage_one": False,
    }
    return Namespace(**(values | overrides))


def fused(parameters: Mapping[str, Tensor]) -> dict[str, Any]:
    """As Transformer Engine's layers name them, with what they keep beside their weights."""
    model: dict[str, Any] = OrderedDict()
    for name, tensor in parameters.items():
        name = name.replace(".input_layernorm.weight", ".self_attention.linear_qkv.layer_norm_weight")
        name = name.replace(".pre_mlp_layernorm.weight", ".mlp.linear_fc1.layer_norm_weight")
        model[name] = tensor
        if name.endswith(("linear_qkv.weight", "linear_fc2.weight")):
            state = io.BytesIO()
            torch.save(None, state)
            state.seek(0)
            model[name.replace(".weight", "._extra_state")] = state
        if name.endswith("linear_proj.weight"):
            model[name.replace("linear_proj.weight", "core_attention._extra_state")] = None
    model["decoder.final_layernorm._extra_state"] = torch.zeros(3, dtype=torch.uint8)
    model["rotary_pos_emb.inv_freq"] = torch.ones(4)
    return model


def legacy(parameters: Mapping[str, Tensor]) -> dict[str, Any]:
    """As Megatron-LM's models from before megatron-core name and nest them."""
    names = {
        "decoder.": "",
        "final_layernorm": "final_norm",
        "input_layernorm": "input_norm",
        "pre_mlp_layernorm": "post_attention_norm",
        "linear_qkv": "query_key_value",
        "linear_proj": "dense",
        "linear_fc1": "dense_h_to_4h",
        "linear_fc2": "dense_4h_to_h",
    }
    encoder = {}
    for name, tensor in parameters.items():
        if name.startswith("decoder."):
            for ours, theirs in names.items():
                name = name.replace(ours, theirs)
            encoder[name] = tensor
    return {
        "language_model": {
            "embedding": {"word_embeddings": {"weight": parameters["embedding.word_embeddings.weight"]}},
            "encoder": encoder,
            "output_layer": {"weight": parameters["output_layer.weight"]},
        }
    }


def shard(parameters: Mapping[str, Tensor], rank: int, ranks: int) -> dict[str, Tensor]:
    """One tensor-parallel rank's part."""

    def part(name: str, tensor: Tensor) -> Tensor:
        if "linear_fc1" in name:
            return torch.cat([half.chunk(ranks)[rank] for half in tensor.chunk(2)])
        if "linear_proj" in name or "linear_fc2" in name:
            return tensor.chunk(ranks, dim=1)[rank].contiguous()
        return tensor if "norm" in name else tensor.chunk(ranks)[rank].clone()

    return {name: part(name, tensor) for name, tensor in parameters.items()}


def save(
    folder: Path,
    parameters: Mapping[str, Tensor] | None = None,
    *,
    form: Callable[[Mapping[str, Tensor]], dict[str, Any]] = fused,
    ranks: int = 1,
    **overrides: Any,
) -> Path:
    """``mp_rank_*`` in ``folder``; ``overrides`` are of the arguments. Returns the first rank's file."""
    parameters = random_parameters() if parameters is None else parameters
    for rank in range(ranks):
        content = {
            "args": arguments(**({"tensor_model_parallel_size": ranks} | overrides)),
            "checkpoint_version": 3.0,
            "iteration": 2000,
            "model": form(shard(parameters, rank, ranks)),
            "num_floating_point_operations_so_far": 1.5e21,
            "rng_state": [
                {
                    "random_rng_state": random.Random(1).getstate(),
                    "np_rng_state": numpy.random.RandomState(1).get_state(),
                    "torch_rng_state": torch.get_rng_state(),
                }
            ],
        }
        path = folder / f"mp_rank_{rank:02}" / "model_optim_rng.pt"
        path.parent.mkdir(parents=True)
        torch.save(content, path)
    return folder / "mp_rank_00" / "model_optim_rng.pt"
