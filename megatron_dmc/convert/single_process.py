"""megatron-core's parallel state for one process, as much of it as a conversion needs."""

import contextlib
from collections.abc import Iterator

import torch
import torch.distributed as dist
from megatron.core.models.gpt import GPTModel

from megatron_dmc.config import ConfigError, DMCConfig
from megatron_dmc.distributed.world import world
from megatron_dmc.model.gpt import build_model, transformer_config
from megatron_dmc.model.model_config import ModelConfig


@contextlib.contextmanager
def single_process() -> Iterator[None]:
    """A world of this process alone. One that is already there is used and left as it is.

    Raises:
        ConfigError: the process is one of several.
    """
    with world():
        if dist.get_world_size() != 1:
            raise ConfigError(f"a conversion runs in one process, not in one of {dist.get_world_size()}")
        yield


def empty_model(model: ModelConfig, dmc: DMCConfig | None, dtype: torch.dtype) -> GPTModel:
    """The whole model on the CPU, in ``dtype``, its weights not initialized."""
    config = transformer_config(model, params_dtype=dtype, use_cpu_initialization=True, perform_initialization=False)
    # Both forms have the same parameters; Transformer Engine's would want a GPU.
    return build_model(model, dmc, config, use_transformer_engine=False)
