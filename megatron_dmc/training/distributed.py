"""The process group and megatron-core's parallel state of a run."""

import contextlib
import os
from collections.abc import Iterator

import torch
import torch.distributed as dist
from megatron.core import parallel_state, tensor_parallel

from megatron_dmc.config import ConfigError
from megatron_dmc.training import cpu
from megatron_dmc.training.arguments import ParallelConfig


@contextlib.contextmanager
def world(parallel: ParallelConfig | None = None) -> Iterator[None]:
    """Joins the processes that torchrun started (this one alone otherwise) and lays a model out over them.

    What is there already is used and left as it is.

    Raises:
        ConfigError: the layout does not fit the number of processes, or srun was used without their variables.
    """
    parallel = parallel or ParallelConfig()
    cpu.install()
    starts, lays_out = not dist.is_initialized(), not parallel_state.model_parallel_is_initialized()
    if starts:
        _start()
    try:
        _check_size(parallel)
        if lays_out:
            parallel_state.initialize_model_parallel(
                tensor_model_parallel_size=parallel.tensor_model_parallel_size,
                pipeline_model_parallel_size=parallel.pipeline_model_parallel_size,
                virtual_pipeline_model_parallel_size=parallel.virtual_pipeline_model_parallel_size,
                context_parallel_size=parallel.context_parallel_size,
            )
        yield
    finally:
        if lays_out and parallel_state.model_parallel_is_initialized():
            parallel_state.destroy_model_parallel()
        if starts:
            dist.destroy_process_group()


def seed_weights(seed: int) -> None:
    """The generators that initial weights are drawn from; call it before a model is built."""
    # On a CPU megatron-core draws the whole weight on every rank and keeps a shard.
    torch.manual_seed(seed)
    tensor_parallel.model_parallel_cuda_manual_seed(seed)


def _start() -> None:
    on_gpu = torch.cuda.is_available()
    if on_gpu:
        torch.cuda.set_device(int(os.environ.get("LOCAL_RANK", 0)))
    backend = "nccl" if on_gpu else "gloo"
    if "RANK" in os.environ:
        dist.init_process_group(backend)
    # Set by srun for its tasks, unlike SLURM_NTASKS, which every command of a batch script sees.
    elif int(os.environ.get("SLURM_STEP_NUM_TASKS", 1)) > 1:
        raise ConfigError(
            "several SLURM tasks, but RANK is not set: start with torchrun, or export RANK, WORLD_SIZE, LOCAL_RANK and "
            "MASTER_ADDR"
        )
    else:
        # A store in memory: one process needs no port.
        dist.init_process_group(backend, store=dist.HashStore(), rank=0, world_size=1)


def _check_size(parallel: ParallelConfig) -> None:
    model_ranks = (
        parallel.tensor_model_parallel_size * parallel.pipeline_model_parallel_size * parallel.context_parallel_size
    )
    if dist.get_world_size() % model_ranks:
        raise ConfigError(
            f"parallel: tensor x pipeline x context = {model_ranks} must divide the number of processes "
            f"({dist.get_world_size()}); start a multiple of {model_ranks}"
        )
