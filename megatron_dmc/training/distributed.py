"""The process group and megatron-core's parallel state of a run."""

import os
import socket

import torch
import torch.distributed as dist
from megatron.core import parallel_state, tensor_parallel

from megatron_dmc.config import ConfigError
from megatron_dmc.training import cpu
from megatron_dmc.training.arguments import ParallelConfig


def initialize(parallel: ParallelConfig, seed: int) -> None:
    """Joins the processes that torchrun or srun started (one alone otherwise) and lays out the model over them.

    Raises:
        ConfigError: the layout does not fit the number of processes.
    """
    cpu.install()
    if not dist.is_initialized():
        if "RANK" not in os.environ:
            _stand_alone()
        on_gpu = torch.cuda.is_available()
        if on_gpu:
            torch.cuda.set_device(int(os.environ.get("LOCAL_RANK", 0)))
        dist.init_process_group("nccl" if on_gpu else "gloo")
    model_ranks = (
        parallel.tensor_model_parallel_size * parallel.pipeline_model_parallel_size * parallel.context_parallel_size
    )
    if dist.get_world_size() % model_ranks:
        raise ConfigError(
            f"parallel: tensor x pipeline x context = {model_ranks} must divide the number of processes "
            f"({dist.get_world_size()}); start a multiple of {model_ranks}"
        )
    if not parallel_state.model_parallel_is_initialized():
        parallel_state.initialize_model_parallel(
            tensor_model_parallel_size=parallel.tensor_model_parallel_size,
            pipeline_model_parallel_size=parallel.pipeline_model_parallel_size,
            virtual_pipeline_model_parallel_size=parallel.virtual_pipeline_model_parallel_size,
            context_parallel_size=parallel.context_parallel_size,
        )
    # Weights drawn on a CPU take the same generator on every rank (megatron-core draws the whole and keeps a shard).
    torch.manual_seed(seed)
    tensor_parallel.model_parallel_cuda_manual_seed(seed)


def finalize() -> None:
    """Leaves the process group, if there is one."""
    if dist.is_initialized():
        parallel_state.destroy_model_parallel()
        dist.destroy_process_group()


def _stand_alone() -> None:
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        port = probe.getsockname()[1]
    os.environ.update(RANK="0", WORLD_SIZE="1", LOCAL_RANK="0", MASTER_ADDR="127.0.0.1", MASTER_PORT=str(port))
