"""A model of megatron-core in this process alone, for the benchmarks; torch and megatron-core are all it needs."""

from typing import Any

import torch
import torch.distributed as dist
from megatron.core import parallel_state, tensor_parallel
from megatron.core.models.gpt import GPTModel

from megatron_dmc.config import DMCConfig
from megatron_dmc.distributed import cpu
from megatron_dmc.model.gpt import build_model, dmc_layers, transformer_config
from megatron_dmc.model.model_config import ModelConfig

SIZES = ModelConfig(
    num_layers=4,
    hidden_size=512,
    ffn_hidden_size=1408,
    num_attention_heads=8,
    num_query_groups=4,
    vocab_size=8192,
    max_position_embeddings=2048,
)


def initialize() -> None:
    """A process group of one, and megatron-core's parallel state over it."""
    cpu.install()
    if torch.cuda.is_available():
        torch.cuda.set_device(0)
    # A store in memory: no port is opened.
    dist.init_process_group(
        "nccl" if torch.cuda.is_available() else "gloo", store=dist.HashStore(), rank=0, world_size=1
    )
    parallel_state.initialize_model_parallel()
    tensor_parallel.model_parallel_cuda_manual_seed(1234)


def finalize() -> None:
    parallel_state.destroy_model_parallel()
    dist.destroy_process_group()


def make_model(sizes: ModelConfig, dmc: DMCConfig | None, dtype: torch.dtype = torch.float32) -> GPTModel:
    """The same weights every time, on a GPU if there is one, without Transformer Engine."""
    torch.manual_seed(0)
    # Drawn on the CPU in float32 whatever the dtype.
    config = transformer_config(sizes, use_cpu_initialization=True, bias_activation_fusion=False)
    model = build_model(sizes, dmc, config, use_transformer_engine=False)
    return model.to(device="cuda" if torch.cuda.is_available() else "cpu", dtype=dtype)


def arguments(sizes: ModelConfig, batch: int, seq: int, device: str) -> dict[str, Any]:
    """Token ids, positions, labels, and the samples' numbers in the mask's place."""
    generator = torch.Generator().manual_seed(1)
    tokens = torch.randint(sizes.vocab_size, (batch, seq + 1), generator=generator).to(device)
    return {
        "input_ids": tokens[:, :-1].contiguous(),
        "position_ids": torch.arange(seq, device=device)[None].expand(batch, -1),
        "attention_mask": torch.arange(batch, device=device),
        "labels": tokens[:, 1:].contiguous(),
    }


def training_step(model: GPTModel, inputs: dict[str, Any]) -> torch.Tensor:
    """Forward and backward; the mean loss. Statistics of the decisions are dropped, as between two steps."""
    model.zero_grad(set_to_none=True)
    loss = model(**inputs).mean()
    loss.backward()
    for layer in dmc_layers(model):
        layer.statistics.reset()
    return loss.detach()


# Without a bias the decisions of an untrained model merge half of the tokens.
DMC_SOURCES = {
    "neuron": DMCConfig(decision_source="neuron", decision_bias=0.0),
    "projection": DMCConfig(decision_source="projection", decision_bias=0.0),
}
