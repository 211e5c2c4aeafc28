"""A whole model's names and shapes in one process: what a conversion asks megatron-core for."""

import torch
from megatron.core.models.gpt import GPTModel

from megatron_dmc.config import DMCConfig
from megatron_dmc.distributed.world import single_process
from megatron_dmc.model.gpt import build_model, transformer_config
from megatron_dmc.model.model_config import ModelConfig

__all__ = ["empty_model", "shapes_only", "single_process"]


def empty_model(model: ModelConfig, dmc: DMCConfig | None, dtype: torch.dtype) -> GPTModel:
    """The whole model on the CPU, in ``dtype``, its weights not initialized."""
    config = transformer_config(model, params_dtype=dtype, use_cpu_initialization=True, perform_initialization=False)
    # Both forms have the same parameters; Transformer Engine's would want a GPU.
    return build_model(model, dmc, config, use_transformer_engine=False)


def shapes_only(model: ModelConfig, dmc: DMCConfig | None, dtype: torch.dtype) -> GPTModel:
    """As :func:`empty_model`, on the meta device: it has names, shapes and dtypes, and takes no memory."""
    with torch.device("meta"):
        return empty_model(model, dmc, dtype)
