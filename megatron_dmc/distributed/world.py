"""The process group and megatron-core's parallel state of a run."""

import contextlib
import os
import socket
import sys
import threading
import time
import warnings
from collections.abc import Callable, Iterator
from datetime import timedelta

import torch
import torch.distributed as dist
from megatron.core import parallel_state, tensor_parallel

from megatron_dmc.config import ConfigError
from megatron_dmc.distributed import cpu
from megatron_dmc.distributed.launcher import ThisRankError, check_runs_alone, own_task, threads_per_process
from megatron_dmc.distributed.task import Task
from megatron_dmc.recipe import ParallelConfig, divisors

# Processes that a launcher starts meet within seconds.
SECONDS_BEFORE_HINT = 20.0
# Counts the tasks that have come, in their store.
_CAME = "megatron_dmc/came"
_ALONE = "unset RANK, WORLD_SIZE and SLURM_STEP_NUM_TASKS"


@contextlib.contextmanager
def world(
    parallel: ParallelConfig | None = None,
    *,
    rendezvous_timeout: timedelta = timedelta(minutes=10),
    must_stop: Callable[[], bool] = lambda: False,
) -> Iterator[None]:
    """Joins the processes that torchrun or srun started (this one alone otherwise) and lays a model out over them.

    What is there already is used and left as it is.

    Args:
        rendezvous_timeout: how long the processes wait for one another.
        must_stop: whether this process was asked to end; it then waits no longer.

    Raises:
        ConfigError: the layout does not fit the number of processes, what the environment says of them is not whole, or
            they did not meet.
        KeyboardInterrupt: it was asked to end before all had come.
    """
    # megatron-core calls these two by the names that torch had for them before 2.13.
    warnings.filterwarnings(
        "ignore", r"`torch\.distributed\.(all_gather_into_tensor|reduce_scatter_tensor)` is deprecated", FutureWarning
    )
    cpu.install()
    parallel = parallel or ParallelConfig()
    if dist.is_initialized():
        with _laid_out(parallel):
            yield
    else:
        with _group(own_task(os.environ), rendezvous_timeout, must_stop), _laid_out(parallel):
            yield


@contextlib.contextmanager
def single_process() -> Iterator[None]:
    """A world of this process alone, whatever the environment says. One that is already there is used and left as it is.

    Raises:
        ConfigError: the process is one of several.
    """
    cpu.install()
    if dist.is_initialized():
        if dist.get_world_size() != 1:
            raise ConfigError(f"this is made for one process, not for one of {dist.get_world_size()}")
        with _laid_out(ParallelConfig()):
            yield
    else:
        check_runs_alone()
        with _group(None), _laid_out(ParallelConfig()):
            yield


@contextlib.contextmanager
def _laid_out(parallel: ParallelConfig) -> Iterator[None]:
    """megatron-core's parallel state over the process group that is there."""
    lays_out = not parallel_state.model_parallel_is_initialized()
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


@contextlib.contextmanager
def _group(
    task: Task | None, timeout: timedelta = timedelta(0), must_stop: Callable[[], bool] = lambda: False
) -> Iterator[None]:
    """The default process group of the processes that ``task`` is one of; None: of this one alone."""
    backend = "nccl" if torch.cuda.is_available() else "gloo"
    local_rank = 0 if task is None else task.local_rank
    if not os.environ.get("RANK") and torch.cuda.device_count() == 1:
        # SLURM can be told to show each task only its own GPU (--gpus-per-task, --gpu-bind).
        local_rank = 0
    _use_device(local_rank)
    threads = threads_per_process(os.environ, task, len(os.sched_getaffinity(0)))
    if threads is not None and threads < torch.get_num_threads():
        torch.set_num_threads(threads)
    if task is None or task.world_size == 1:
        try:
            # A store in memory: one process needs no port.
            dist.init_process_group(backend, store=dist.HashStore(), rank=0, world_size=1)
        except RuntimeError as error:
            names = " and ".join(name for name in sorted(os.environ) if name.endswith("_SOCKET_IFNAME"))
            remedy = f"unset {names}, or name an interface of this machine" if names else "look at its network"
            raise ConfigError(
                f"{backend} finds no way to talk to this machine itself ({_first_line(error)}); {remedy}"
            ) from None
    else:
        meet(backend, task, timeout, must_stop)
    try:
        yield
    finally:
        dist.destroy_process_group()


def _first_line(error: BaseException) -> str:
    return str(error).split("\n", maxsplit=1)[0]


def _use_device(local_rank: int) -> None:
    if not torch.cuda.is_available():
        return
    if local_rank >= torch.cuda.device_count():
        raise ThisRankError(
            f"local rank {local_rank} has no GPU, this node has {torch.cuda.device_count()}; start at most one process per "
            "GPU (--nproc-per-node, --ntasks-per-node)"
        )
    torch.cuda.set_device(local_rank)


def meet(backend: str, task: Task, timeout: timedelta, must_stop: Callable[[], bool] = lambda: False) -> None:
    """Makes the default process group of all tasks. See :func:`world` for ``must_stop``.

    Raises:
        ConfigError: not all came to ``task.host`` and ``task.port`` in time, or rank 0 cannot listen there.
    """
    deadline = time.monotonic() + timeout.total_seconds()
    store: dist.Store
    # One process that is started by hand in a shell where an earlier launcher left its variables looks the same.
    hint = threading.Timer(
        SECONDS_BEFORE_HINT,
        print,
        [
            f"rank 0 of {task.world_size} waits for the others at {task.host}:{task.port}, at most "
            f"{timeout.total_seconds():g} s; if this process is to run alone, {_ALONE}"
        ],
        {"file": sys.stderr, "flush": True},
    )
    hint.daemon = True
    if task.rank == 0:
        hint.start()
    try:
        if task.agent_listens:
            store = next(dist.rendezvous("env://", task.rank, task.world_size, timeout=timeout))[0]
        else:
            _wait_for_address(task, deadline, must_stop)
            left = timedelta(seconds=max(deadline - time.monotonic(), 1.0))
            # torch's own wait for the workers answers no signal.
            store = dist.TCPStore(
                *(task.host, task.port, task.world_size), is_master=task.rank == 0, timeout=left, wait_for_workers=False
            )
            _wait_for_all(store, task, deadline, must_stop)
        dist.init_process_group(backend, store=store, rank=task.rank, world_size=task.world_size)
    except (RuntimeError, OSError) as error:
        raise ConfigError(
            f"rank {task.rank} of {task.world_size} did not meet the others at {task.host}:{task.port} within "
            f"{timeout.total_seconds():g} s; see why other tasks ended, or export MASTER_ADDR and MASTER_PORT for another "
            f"address, or to run alone, {_ALONE} ({_first_line(error)})"
        ) from None
    finally:
        hint.cancel()


def _wait_for_all(store: dist.Store, task: Task, deadline: float, must_stop: Callable[[], bool]) -> None:
    """Returns when every task has called this, else raises RuntimeError."""
    came = store.add(_CAME, 1)
    while came < task.world_size:
        if time.monotonic() >= deadline:
            raise RuntimeError(f"{came} of {task.world_size} came")
        _pause(must_stop)
        came = store.add(_CAME, 0)


def _pause(must_stop: Callable[[], bool]) -> None:
    if must_stop():
        raise KeyboardInterrupt("before all processes had come")
    time.sleep(0.1)


def _wait_for_address(task: Task, deadline: float, must_stop: Callable[[], bool]) -> None:
    """Returns when somebody listens there, or, on rank 0, which will, when the host's name is known; else raises OSError.

    torch would wait as well, and write pages about it.
    """
    while True:
        try:
            if task.rank == 0:
                socket.getaddrinfo(task.host, task.port)
            else:
                socket.create_connection((task.host, task.port), timeout=max(deadline - time.monotonic(), 1.0)).close()
            return
        except OSError:
            if time.monotonic() >= deadline:
                raise
            _pause(must_stop)


def _check_size(parallel: ParallelConfig) -> None:
    model_ranks, processes = parallel.model_ranks, dist.get_world_size()
    if processes % model_ranks:
        raise ConfigError(
            f"parallel: tensor {parallel.tensor_model_parallel_size} x pipeline {parallel.pipeline_model_parallel_size} x "
            f"context {parallel.context_parallel_size} = {model_ranks} must divide the number of processes ({processes}); "
            f"start {model_ranks} or a multiple of it, or choose sizes whose product is one of "
            f"{', '.join(map(str, divisors(processes)))}"
        )
