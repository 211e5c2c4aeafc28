"""A process's place among the tasks that srun started, from the variables that SLURM sets in each of them."""

import re
from collections.abc import Mapping

from megatron_dmc.config import ConfigError
from megatron_dmc.distributed.task import Task, master_port, number

# Below the ports that Linux hands out by itself.
_FIRST_PORT, _PORTS = 20000, 12000
_REASON = "this process looks like one of several SLURM tasks"
_REMEDY = "start with srun, or export RANK, WORLD_SIZE, LOCAL_RANK, MASTER_ADDR and MASTER_PORT"


def slurm_task(environment: Mapping[str, str]) -> Task | None:
    """This process's task, or None unless srun started several.

    The tasks meet on the step's first node, where srun puts rank 0, at a port that follows from the job and step;
    ``MASTER_ADDR`` and ``MASTER_PORT`` name others.

    Raises:
        ConfigError: a variable is missing or not what SLURM writes.
    """
    # Set by srun for its tasks, unlike SLURM_NTASKS, which every command of a batch script sees.
    if environment.get("SLURM_STEP_NUM_TASKS", "1") == "1":
        return None
    world_size = _number(environment, "SLURM_STEP_NUM_TASKS")
    rank = _number(environment, "SLURM_PROCID")
    if rank >= world_size:
        raise ConfigError(f"SLURM_PROCID {rank} must be below SLURM_STEP_NUM_TASKS {world_size}; {_REMEDY}")
    host = environment.get("MASTER_ADDR") or first_host(environment.get("SLURM_STEP_NODELIST", ""))
    if environment.get("MASTER_PORT"):
        port = master_port(environment, _REASON, _REMEDY)
    else:
        # Steps of one job may run side by side, and so may jobs that share a node.
        job_and_step = 10 * _number(environment, "SLURM_JOB_ID") + _number(environment, "SLURM_STEP_ID")
        port = _FIRST_PORT + job_and_step % _PORTS
    return Task(rank, world_size, _number(environment, "SLURM_LOCALID"), host, port)


def first_host(node_list: str) -> str:
    """The first host of a SLURM node list: ``rack[1-2]n[03,05-07],login`` begins with ``rack1n03``.

    Raises:
        ConfigError: it is no node list.
    """
    first = re.match(r"((?:[\w.-]|\[\d[\d,-]*\])+)(?:,|$)", node_list)
    if first is None:
        raise ConfigError(f"SLURM_STEP_NODELIST is {node_list!r}, not a list of nodes; {_REMEDY}")
    return re.sub(r"\[(\d+)[^\]]*\]", r"\1", first[1])


def _number(environment: Mapping[str, str], name: str) -> int:
    return number(environment, name, _REASON, _REMEDY)
