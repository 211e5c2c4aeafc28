"""The process group and megatron-core's parallel state of a run."""

import contextlib
import os
import warnings
from collections.abc import Iterator
from datetime import timedelta

import torch
import torch.distributed as dist
from megatron.core import parallel_state, tensor_parallel

from megatron_dmc.config import ConfigError
from megatron_dmc.distributed import cpu
from megatron_dmc.distributed.slurm import SlurmTask, slurm_task
from megatron_dmc.recipe import ParallelConfig, divisors


@contextlib.contextmanager
def world(
    parallel: ParallelConfig | None = None, *, rendezvous_timeout: timedelta = timedelta(minutes=10)
) -> Iterator[None]:
    """Joins the processes that torchrun or srun started (this one alone otherwise) and lays a model out over them.

    What is there already is used and left as it is.

    Args:
        rendezvous_timeout: how long the tasks of srun wait for one another; torchrun has a wait of its own.

    Raises:
        ConfigError: the layout does not fit the number of processes, or the tasks of srun did not meet.
    """
    parallel = parallel or ParallelConfig()
    # megatron-core calls these two by the names that torch had for them before 2.13.
    warnings.filterwarnings(
        "ignore", r"`torch\.distributed\.(all_gather_into_tensor|reduce_scatter_tensor)` is deprecated", FutureWarning
    )
    cpu.install()
    starts, lays_out = not dist.is_initialized(), not parallel_state.model_parallel_is_initialized()
    if starts:
        _start(rendezvous_timeout)
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
            _lay_down()
        if starts:
            dist.destroy_process_group()


def _lay_down() -> None:
    """megatron-core forgets its groups; they are closed as well, or every layout of a process leaves its threads behind."""
    groups = list(parallel_state._global_process_group_list or ())
    parallel_state.destroy_model_parallel()
    for group in groups:
        # None stands for the default group; some groups megatron-core has closed itself.
        with contextlib.suppress(ValueError):
            if group is not None:
                dist.destroy_process_group(group)


def seed_weights(seed: int) -> None:
    """The generators that initial weights are drawn from; call it before a model is built."""
    # On a CPU megatron-core draws the whole weight on every rank and keeps a shard.
    torch.manual_seed(seed)
    tensor_parallel.model_parallel_cuda_manual_seed(seed)


def _start(rendezvous_timeout: timedelta) -> None:
    backend = "nccl" if torch.cuda.is_available() else "gloo"
    if "RANK" in os.environ:
        _use_device(int(os.environ.get("LOCAL_RANK", 0)))
        dist.init_process_group(backend)
    elif (task := slurm_task(os.environ)) is not None:
        # SLURM can be told to show each task its own GPU alone (--gpus-per-task, --gpu-bind).
        _use_device(task.local_rank if torch.cuda.device_count() > 1 else 0)
        meet(backend, task, rendezvous_timeout)
    else:
        _use_device(0)
        # A store in memory: one process needs no port.
        dist.init_process_group(backend, store=dist.HashStore(), rank=0, world_size=1)


def _use_device(local_rank: int) -> None:
    if not torch.cuda.is_available():
        return
    if local_rank >= torch.cuda.device_count():
        raise ConfigError(
            f"local rank {local_rank} has no GPU, this node has {torch.cuda.device_count()}; start at most one process per "
            "GPU (--nproc-per-node, --ntasks-per-node)"
        )
    torch.cuda.set_device(local_rank)


def meet(backend: str, task: SlurmTask, timeout: timedelta) -> None:
    """Makes the default process group of a step's tasks.

    Raises:
        ConfigError: not all came to ``task.host`` and ``task.port`` in time, or rank 0 cannot listen there.
    """
    try:
        store = dist.TCPStore(task.host, task.port, task.world_size, is_master=task.rank == 0, timeout=timeout)
        dist.init_process_group(backend, store=store, rank=task.rank, world_size=task.world_size)
    except RuntimeError as error:
        reason = str(error).split("\n", maxsplit=1)[0]
        raise ConfigError(
            f"rank {task.rank} of {task.world_size} did not meet the others at {task.host}:{task.port} within "
            f"{timeout.total_seconds():g} s; see why other tasks ended, or export MASTER_ADDR and MASTER_PORT for another "
            f"address ({reason})"
        ) from None


def _check_size(parallel: ParallelConfig) -> None:
    model_ranks, processes = parallel.model_ranks, dist.get_world_size()
    if processes % model_ranks:
        raise ConfigError(
            f"parallel: tensor {parallel.tensor_model_parallel_size} x pipeline {parallel.pipeline_model_parallel_size} x "
            f"context {parallel.context_parallel_size} = {model_ranks} must divide the number of processes ({processes}); "
            f"start {model_ranks} or a multiple of it, or choose sizes whose product is one of "
            f"{', '.join(map(str, divisors(processes)))}"
        )
