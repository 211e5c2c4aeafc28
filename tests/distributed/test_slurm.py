"""A task's rank from SLURM's variables, and tasks that do not find one another. tests/slurm runs a real SLURM."""

import re
import socket
from collections.abc import Iterator
from datetime import timedelta

import pytest

from megatron_dmc.config import ConfigError
from megatron_dmc.distributed.slurm import first_host, slurm_task
from megatron_dmc.distributed.task import Task
from megatron_dmc.distributed.world import meet

TASK = {
    "SLURM_JOB_ID": "1234",
    "SLURM_STEP_ID": "0",
    "SLURM_STEP_NUM_TASKS": "128",
    "SLURM_STEP_NODELIST": "dgx[003-017,021]",
    "SLURM_PROCID": "13",
    "SLURM_LOCALID": "5",
}


def test_a_task_finds_its_place() -> None:
    task = slurm_task(TASK)
    assert task is not None
    assert (task.rank, task.world_size, task.local_rank, task.host) == (13, 128, 5, "dgx003")
    assert 20000 <= task.port < 32000


def test_every_task_of_a_step_finds_the_same_port_and_other_steps_and_jobs_another() -> None:
    def port(**changes: str) -> int:
        task = slurm_task({**TASK, **changes})
        assert task is not None
        return task.port

    assert port(SLURM_PROCID="0", SLURM_LOCALID="0") == port()
    assert len({port(), port(SLURM_STEP_ID="1"), port(SLURM_JOB_ID="1235"), port(SLURM_JOB_ID="7654321")}) == 4


@pytest.mark.parametrize(
    "environment", [{}, {"SLURM_NTASKS": "128", "SLURM_PROCID": "0"}, {"SLURM_STEP_NUM_TASKS": "1"}]
)
def test_one_task_and_a_batch_script_stand_alone(environment: dict[str, str]) -> None:
    assert slurm_task(environment) is None


def test_the_user_names_another_meeting_place() -> None:
    task = slurm_task({**TASK, "MASTER_ADDR": "10.0.0.7", "MASTER_PORT": "4321"})
    assert task == Task(13, 128, 5, "10.0.0.7", 4321)


@pytest.mark.parametrize(
    ("name", "value", "message"),
    [
        ("SLURM_PROCID", None, "SLURM_PROCID is not set"),
        ("SLURM_PROCID", "128", "SLURM_PROCID 128 must be below SLURM_STEP_NUM_TASKS 128"),
        ("SLURM_LOCALID", "-1", "SLURM_LOCALID is '-1', not a number"),
        ("SLURM_STEP_NUM_TASKS", "many", "SLURM_STEP_NUM_TASKS is 'many', not a number"),
        ("SLURM_STEP_NODELIST", None, "SLURM_STEP_NODELIST is '', not a list of nodes"),
        ("SLURM_STEP_NODELIST", "n[0-", "SLURM_STEP_NODELIST is 'n[0-', not a list of nodes"),
        ("SLURM_JOB_ID", None, "SLURM_JOB_ID is not set"),
        ("MASTER_PORT", "http", "MASTER_PORT is 'http', not a number"),
    ],
)
def test_variables_that_cannot_be(name: str, value: str | None, message: str) -> None:
    environment = {**TASK, name: value}
    with pytest.raises(ConfigError, match=f"{re.escape(message)}.*; start with srun, or export RANK"):
        slurm_task({key: text for key, text in environment.items() if text is not None})


@pytest.mark.parametrize(
    ("node_list", "host"),
    [
        ("n7", "n7"),
        ("n1,n2", "n1"),
        ("n[0-1]", "n0"),
        ("n[08,10-12]", "n08"),
        ("rack[1-2]n[03,05-07],login", "rack1n03"),
        ("gpu-a[1-4].cluster.org,gpu-b1", "gpu-a1.cluster.org"),
    ],
)
def test_first_host(node_list: str, host: str) -> None:
    assert first_host(node_list) == host


@pytest.fixture
def listener() -> Iterator[socket.socket]:
    with socket.socket() as listener:
        listener.bind(("127.0.0.1", 0))
        yield listener


@pytest.mark.parametrize("rank", [0, 1])
def test_tasks_that_do_not_come_are_named_with_the_address(listener: socket.socket, rank: int) -> None:
    port = listener.getsockname()[1]
    listener.close()
    message = rf"rank {rank} of 2 did not meet the others at 127\.0\.0\.1:{port} within 1 s; .*export MASTER_ADDR"
    with pytest.raises(ConfigError, match=message):
        meet("gloo", Task(rank, 2, 0, "127.0.0.1", port), timedelta(seconds=1))


def test_a_port_that_is_taken_is_named(listener: socket.socket) -> None:
    listener.listen()
    port = listener.getsockname()[1]
    with pytest.raises(ConfigError, match=rf"127\.0\.0\.1:{port} .*(in use|EADDRINUSE)"):
        meet("gloo", Task(0, 2, 0, "127.0.0.1", port), timedelta(seconds=1))
