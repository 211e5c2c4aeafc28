"""What the environment says of a process that torchrun or srun started; none of it needs a process group, or torch."""

import json
import os
import re
import sys
import time
from collections.abc import Mapping

from megatron_dmc.config import ConfigError
from megatron_dmc.distributed.slurm import slurm_task
from megatron_dmc.distributed.task import Task, master_port, number

_REASON = "RANK is set, so this process looks like one of several"
_REMEDY = (
    "start with torchrun or srun, or export RANK, WORLD_SIZE, LOCAL_RANK, MASTER_ADDR and MASTER_PORT; to run in one "
    "process, unset RANK and WORLD_SIZE"
)
# A rank that prints nothing waits so long before it ends, so that the one that prints for it comes first: a launcher ends
# all processes when one has ended.
_SECONDS_TO_SPEAK = 5.0


class ThisRankError(ConfigError):
    """A fault of this process only: no other rank reports it."""


def own_task(environment: Mapping[str, str]) -> Task | None:
    """This process's place among those that it is to meet; None: it stands alone.

    Raises:
        ConfigError: a variable is missing, or cannot be.
    """
    if not environment.get("RANK"):
        task = slurm_task(environment)
        if task is None and environment.get("WORLD_SIZE", "1") not in ("", "1"):
            raise ConfigError(f"WORLD_SIZE is {environment['WORLD_SIZE']!r}, but RANK is not set; {_REMEDY}")
        return task
    rank = number(environment, "RANK", _REASON, _REMEDY)
    world_size = number(environment, "WORLD_SIZE", _REASON, _REMEDY)
    if rank >= world_size:
        raise ConfigError(f"RANK {rank} must be below WORLD_SIZE {world_size}; {_REMEDY}")
    local_rank = number(environment, "LOCAL_RANK", _REASON, _REMEDY) if environment.get("LOCAL_RANK") else 0
    if world_size == 1:
        return Task(0, 1, local_rank, "", 0)
    if not environment.get("MASTER_ADDR"):
        raise ConfigError(f"{_REASON}, but MASTER_ADDR is not set; {_REMEDY}")
    agent_listens = environment.get("TORCHELASTIC_USE_AGENT_STORE") == "True"
    port = master_port(environment, _REASON, _REMEDY)
    return Task(rank, world_size, local_rank, environment["MASTER_ADDR"], port, agent_listens)


def threads_per_process(environment: Mapping[str, str], task: Task | None, cores: int) -> int | None:
    """How many OpenMP threads this process may use, where it shares its node with others of its run.

    torchrun sets ``OMP_NUM_THREADS``. srun and a start by hand do not: every process would take a thread per core.

    Args:
        cores: that this process may run on.

    Returns:
        At least 1; None where ``OMP_NUM_THREADS`` says it, the process is alone, or nobody says how many share the node.
    """
    if task is None or task.world_size == 1 or environment.get("OMP_NUM_THREADS"):
        return None
    if environment.get("LOCAL_WORLD_SIZE", "").isdecimal():
        return max(1, cores // max(1, int(environment["LOCAL_WORLD_SIZE"])))
    if environment.get("RANK"):
        here = environment.get("MASTER_ADDR") in ("localhost", "127.0.0.1", "::1")
        return max(1, cores // task.world_size) if here else None
    # "2(x3),8": the nodes' numbers of tasks. The largest leaves every node enough.
    tasks = re.findall(r"(?<!x)\b\d+", environment.get("SLURM_STEP_TASKS_PER_NODE", ""))
    if not tasks:
        return None
    # A task that is bound to its share sees its own cores only, so the share is of the node's.
    node = environment.get("SLURM_CPUS_ON_NODE", "")
    share = (int(node) if node.isdecimal() else cores) // max(1, *map(int, tasks))
    return max(1, min(cores, share))


def check_runs_alone(environment: Mapping[str, str] = os.environ) -> None:
    """For what is made for one process. What an earlier launcher left in the environment (of a job, a pod) does no harm.

    Raises:
        ConfigError: a launcher that is at work started several processes, which would all write the same output.
    """
    if _torchrun_started_several(environment):
        raise ConfigError(
            f"this command is made for one process, but torchrun started {environment['WORLD_SIZE']}; start it without "
            "torchrun"
        )
    task, tasks = environment.get("SLURM_PROCID", "0"), environment.get("SLURM_STEP_NUM_TASKS", "1")
    # A shell that srun --pty opens is task 0, and so is the one that a script chooses for such a command.
    if tasks != "1" and task != "0":
        raise ThisRankError(
            f"this command is made for one process, and this is task {task} of {tasks}: only task 0 goes on; start it with "
            "srun --ntasks=1"
        )


def speaks_for_its_node(environment: Mapping[str, str] = os.environ) -> bool:
    """Whether this process prints what all processes of its node would: it is the first one, or stands alone."""
    if _torchrun_started_several(environment):
        return environment.get("LOCAL_RANK", "0") == "0"
    if not environment.get("RANK") and environment.get("SLURM_STEP_NUM_TASKS", "1") != "1":
        return environment.get("SLURM_LOCALID", "0") == "0"
    return True


def _torchrun_started_several(environment: Mapping[str, str]) -> bool:
    return "TORCHELASTIC_RUN_ID" in environment and environment.get("WORLD_SIZE", "1") != "1"


def report_failure(line: str, *, of_this_rank: bool = False) -> None:
    """Prints why this process ends, on standard error; before it ends.

    Ranks of one node see the same files and fail alike, so the first one speaks for all. torchrun shows the line again at
    the end of its own report.

    Args:
        line: the failure.
        of_this_rank: whether it is a :class:`ThisRankError`: then no other rank tells of it.
    """
    _tell_torchrun(line)
    if of_this_rank or speaks_for_its_node():
        print(line, file=sys.stderr, flush=True)
    else:
        time.sleep(_SECONDS_TO_SPEAK)


def _tell_torchrun(line: str) -> None:
    """Writes the file that torchrun reads when one of its processes has failed (torch.distributed.elastic's error file)."""
    path = os.environ.get("TORCHELASTIC_ERROR_FILE")
    if not path:
        return
    extra = {"py_callstack": line, "timestamp": str(int(time.time()))}
    try:
        with open(path, "w", encoding="utf-8") as file:
            json.dump({"message": {"message": line, "extraInfo": extra}}, file)
    except OSError:
        # torchrun then reports that there is no such file; the line itself is printed.
        return
