"""Variables that a launcher sets, half sets, or has left behind: a run's processes meet or say why, a command for one stands
alone, and what all ranks would say is said once."""

import json
import os
import re
import signal
import socket
import subprocess
import sys
from pathlib import Path

import pytest

from megatron_dmc.config import ConfigError
from megatron_dmc.distributed.launcher import check_runs_alone, own_task, speaks_for_its_node, threads_per_process
from megatron_dmc.distributed.task import Task
from tests.support.processes import ROOT, meeting_place, run, started
from tests.support.toy import recipe_values, write_recipe

MEETING = {"MASTER_ADDR": "10.0.0.7", "MASTER_PORT": "4321"}
RANK = {"RANK": "9", "WORLD_SIZE": "16", "LOCAL_RANK": "1", **MEETING}
TORCHRUN = {**RANK, "TORCHELASTIC_RUN_ID": "none", "TORCHELASTIC_USE_AGENT_STORE": "True"}
SRUN = {"SLURM_JOB_ID": "7", "SLURM_STEP_ID": "0", "SLURM_STEP_NUM_TASKS": "4", "SLURM_STEP_NODELIST": "localhost"}
FIRST = {**SRUN, "SLURM_PROCID": "0", "SLURM_LOCALID": "0"}


@pytest.mark.parametrize(
    ("environment", "task"),
    [
        ({}, None),
        ({"WORLD_SIZE": "1"}, None),
        ({"RANK": "", "WORLD_SIZE": ""}, None),
        (RANK, Task(9, 16, 1, "10.0.0.7", 4321)),
        (TORCHRUN, Task(9, 16, 1, "10.0.0.7", 4321, agent_listens=True)),
        ({**RANK, "LOCAL_RANK": ""}, Task(9, 16, 0, "10.0.0.7", 4321)),
        ({"RANK": "0", "WORLD_SIZE": "1", "LOCAL_RANK": "3"}, Task(0, 1, 3, "", 0)),
        ({**FIRST, "WORLD_SIZE": "4", **MEETING}, Task(0, 4, 0, "10.0.0.7", 4321)),
    ],
)
def test_a_process_finds_its_place(environment: dict[str, str], task: Task | None) -> None:
    assert own_task(environment) == task


BY_HAND = {"RANK": "1", "WORLD_SIZE": "4", "LOCAL_RANK": "1", "MASTER_ADDR": "localhost", "MASTER_PORT": "4321"}
SLURM_NODE = {**FIRST, "SLURM_STEP_TASKS_PER_NODE": "4", "SLURM_CPUS_ON_NODE": "32"}


@pytest.mark.parametrize(
    ("environment", "cores", "threads"),
    [
        # Alone, or told how many: as torch has it.
        ({}, 8, None),
        ({**BY_HAND, "OMP_NUM_THREADS": "3"}, 8, None),
        # By hand on this machine, its processes share the cores.
        (BY_HAND, 8, 2),
        (BY_HAND, 2, 1),
        # Elsewhere as well: how many of them are here, only torchrun says (and it sets OMP_NUM_THREADS).
        ({**BY_HAND, "MASTER_ADDR": "10.0.0.7"}, 8, None),
        ({**TORCHRUN, "LOCAL_WORLD_SIZE": "2"}, 8, 4),
        # srun: not bound, all of the job's cores; bound, its own share of the node's.
        (SLURM_NODE, 32, 8),
        (SLURM_NODE, 8, 8),
        ({**SLURM_NODE, "SLURM_STEP_TASKS_PER_NODE": "2(x3),8"}, 32, 4),
        ({name: value for name, value in SLURM_NODE.items() if name != "SLURM_CPUS_ON_NODE"}, 32, 8),
    ],
)
def test_processes_of_a_node_share_its_cores(environment: dict[str, str], cores: int, threads: int | None) -> None:
    assert threads_per_process(environment, own_task(environment), cores) == threads


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"WORLD_SIZE": None}, "WORLD_SIZE is not set"),
        ({"MASTER_ADDR": None}, "MASTER_ADDR is not set"),
        ({"MASTER_PORT": None}, "MASTER_PORT is not set"),
        ({"MASTER_PORT": "http"}, "MASTER_PORT is 'http', not a number"),
        ({"MASTER_PORT": "70000"}, "MASTER_PORT is 70000, not a port"),
        ({"RANK": "first"}, "RANK is 'first', not a number"),
        ({"RANK": "-1"}, "RANK is '-1', not a number"),
        ({"RANK": "16"}, "RANK 16 must be below WORLD_SIZE 16"),
        ({"WORLD_SIZE": "²"}, "WORLD_SIZE is '²', not a number"),
        ({"WORLD_SIZE": "0"}, "RANK 9 must be below WORLD_SIZE 0"),
        ({"LOCAL_RANK": "gpu"}, "LOCAL_RANK is 'gpu', not a number"),
        ({"RANK": None}, "WORLD_SIZE is '16', but RANK is not set"),
    ],
)
def test_variables_that_are_not_whole(change: dict[str, str | None], message: str) -> None:
    environment = {name: value for name, value in {**RANK, **change}.items() if value is not None}
    with pytest.raises(
        ConfigError, match=f"{re.escape(message)}.*; start with torchrun or srun, or export RANK"
    ) as raised:
        own_task(environment)
    assert "\n" not in str(raised.value)


@pytest.mark.parametrize(
    ("environment", "speaks"),
    [
        ({}, True),
        (TORCHRUN, False),
        ({**TORCHRUN, "LOCAL_RANK": "0"}, True),
        # Another node may see other files.
        ({**TORCHRUN, "RANK": "8", "LOCAL_RANK": "0"}, True),
        # No launcher says which of these are on one node.
        (RANK, True),
        (FIRST, True),
        ({**SRUN, "SLURM_PROCID": "3", "SLURM_LOCALID": "1"}, False),
    ],
)
def test_the_first_rank_of_a_node_speaks_for_it(environment: dict[str, str], speaks: bool) -> None:
    assert speaks_for_its_node(environment) == speaks


@pytest.mark.parametrize("environment", [{}, RANK, {"RANK": "0"}, {"WORLD_SIZE": "many"}, FIRST])
def test_what_was_left_behind_is_no_harm(environment: dict[str, str]) -> None:
    check_runs_alone(environment)


@pytest.mark.parametrize(
    ("environment", "message"),
    [
        (TORCHRUN, "made for one process, but torchrun started 16; start it without torchrun"),
        ({**SRUN, "SLURM_PROCID": "3"}, "this is task 3 of 4: only task 0 goes on; start it with srun --ntasks=1"),
    ],
)
def test_a_launcher_that_started_several_is_named(environment: dict[str, str], message: str) -> None:
    with pytest.raises(ConfigError, match=message):
        check_runs_alone(environment)


ALONE = """
import json, os, sys, warnings
warnings.filterwarnings("ignore")
import torch.distributed as dist
from megatron_dmc.distributed.world import single_process
for environment in json.loads(sys.argv[1]):
    os.environ.update(environment)
    with single_process():
        print(dist.get_world_size())
    for name in environment:
        del os.environ[name]
"""


def start(*command: str, **environment: str) -> subprocess.CompletedProcess[str]:
    inherited = {name: value for name, value in os.environ.items() if name not in (*RANK, *FIRST)}
    return subprocess.run(
        command,
        cwd=ROOT,
        env={**inherited, "OMP_NUM_THREADS": "1", **environment},
        capture_output=True,
        text=True,
        timeout=240,
    )


def test_one_process_whatever_the_environment_says() -> None:
    left = [{"RANK": "0"}, {"RANK": "x"}, {**RANK, "RANK": "1", "WORLD_SIZE": "2"}, {"WORLD_SIZE": "2"}, FIRST]
    ended = start(sys.executable, "-c", ALONE, json.dumps(left))
    assert (ended.returncode, ended.stdout.split()) == (0, ["1"] * len(left)), ended.stderr


@pytest.mark.parametrize("command", [["inspect"], ["generate", "--prompt", "one"]], ids=lambda command: command[0])
def test_a_command_for_one_process_waits_for_no_other(command: list[str], tmp_path: Path) -> None:
    ended = start(sys.executable, "-m", "megatron_dmc", *command, str(tmp_path / "nowhere"), **{**RANK, "RANK": "1"})
    assert ended.stderr == f"megatron-dmc: checkpoint {tmp_path / 'nowhere'} does not exist\n"
    assert ended.returncode == 1


MEET = """
import sys, warnings
warnings.filterwarnings("ignore")
from datetime import timedelta
from megatron_dmc.config import ConfigError
from megatron_dmc.distributed.world import world
try:
    with world(rendezvous_timeout=timedelta(seconds=1)):
        print("met")
except ConfigError as error:
    sys.exit(str(error))
"""


THREADS = """
import warnings
warnings.filterwarnings("ignore")
import torch
from megatron_dmc.distributed.world import world
with world():
    print(torch.get_num_threads())
"""


def test_two_processes_take_half_the_cores_each() -> None:
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        place = {"MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(probe.getsockname()[1]), "WORLD_SIZE": "2"}
    inherited = {name: value for name, value in os.environ.items() if name not in (*RANK, *FIRST, "OMP_NUM_THREADS")}
    ranks = [
        subprocess.Popen(
            [sys.executable, "-c", THREADS],
            cwd=ROOT,
            env={**inherited, **place, "RANK": rank, "LOCAL_RANK": rank},
            stdout=subprocess.PIPE,
            text=True,
        )
        for rank in ("0", "1")
    ]
    said = [rank.communicate(timeout=240)[0].split() for rank in ranks]
    assert said == [[str(max(1, len(os.sched_getaffinity(0)) // 2))]] * 2


@pytest.mark.parametrize("own", [None, "3"])
def test_the_slurm_launcher_leaves_the_threads_to_the_run(own: str | None, tmp_path: Path) -> None:
    """A number that the launcher exports would be taken for the user's."""
    srun = tmp_path / "srun"
    srun.write_text('#!/bin/sh\necho "threads: ${OMP_NUM_THREADS-the run\'s}"\n')
    srun.chmod(0o755)
    inherited = {name: value for name, value in os.environ.items() if name != "OMP_NUM_THREADS"}
    job = {"SLURM_JOB_NAME": "job", "SLURM_JOB_ID": "1", "SLURM_JOB_NODELIST": "here", "PYTHON": sys.executable}
    path = f"{tmp_path}{os.pathsep}{os.environ['PATH']}"
    threads = {} if own is None else {"OMP_NUM_THREADS": own}
    launcher = [str(ROOT / "slurm" / "retrofit.sh"), "recipe.yaml"]
    subprocess.run(["bash", *launcher], cwd=tmp_path, env={**inherited, **job, **threads, "PATH": path}, check=True)
    assert (tmp_path / "logs" / "job-1.log").read_text().splitlines()[-1] == "threads: " + (own or "the run's")


@pytest.mark.parametrize("host", ["127.0.0.1", "no-such-host.invalid"])
@pytest.mark.parametrize("rank", ["0", "1"])
def test_nobody_to_meet_is_one_line(rank: str, host: str) -> None:
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        port = str(probe.getsockname()[1])
    ended = start(
        sys.executable, "-c", MEET, RANK=rank, WORLD_SIZE="2", LOCAL_RANK=rank, MASTER_ADDR=host, MASTER_PORT=port
    )
    assert ended.returncode == 1
    assert re.fullmatch(
        rf"rank {rank} of 2 did not meet the others at {re.escape(host)}:{port} within 1 s; .*export MASTER_ADDR.*\n",
        ended.stderr,
    )


def test_an_interface_that_is_not_there() -> None:
    program = "from megatron_dmc.distributed.world import single_process\nwith single_process(): pass"
    said = run("-c", program, GLOO_SOCKET_IFNAME="nowhere0").stderr.splitlines()[-1]
    assert "nowhere0" in said and said.endswith("unset GLOO_SOCKET_IFNAME, or name an interface of this machine")


@pytest.mark.parametrize(
    ("size", "message"),
    [("9" * 30, "must be <= 2147483647, got 9999"), ("9" * 5000, "9999999999... (5000 digits)', not a number; start")],
)
def test_more_processes_than_can_be_counted(size: str, message: str) -> None:
    with pytest.raises(ConfigError, match=re.escape(message)):
        own_task({**RANK, "RANK": "0", "WORLD_SIZE": size})


@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGINT])
def test_a_rank_that_waits_for_others_says_so_and_can_be_stopped(tmp_path: Path, number: signal.Signals) -> None:
    """One process, started by hand in a shell where an earlier launcher left its variables."""
    recipe = write_recipe(tmp_path, recipe_values(tmp_path, tmp_path, [{"kind": "compress", "steps": 2}]))
    hasty = "from megatron_dmc.distributed import world; world.SECONDS_BEFORE_HINT = 0.0"
    program = f"import sys; {hasty}; from megatron_dmc.cli import main; sys.exit(main())"
    place = meeting_place()
    with started("-c", program, "retrofit", recipe, RANK="0", WORLD_SIZE="2", **place) as process:
        assert process.stdout is not None
        lines = (line for line in process.stdout if "waits for the others" in line)
        said = next(lines)
        process.send_signal(number)
        rest = process.stdout.read()
        status = process.wait()
    where = f"{place['MASTER_ADDR']}:{place['MASTER_PORT']}"
    assert said.startswith(
        f"rank 0 of 2 waits for the others at {where}, at most 600 s; if this process is to run alone, unset"
    )
    assert (status, rest.splitlines()[-1]) == (130, "megatron-dmc: interrupted, before all processes had come")


@pytest.mark.distributed
def test_torchrun_ends_with_the_line_that_one_rank_printed(tmp_path: Path) -> None:
    recipe = tmp_path / "recipe.yaml"
    recipe.write_text("model: {num_layers: many}")
    ended = start(
        *(sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc-per-node", "2"),
        *("-m", "megatron_dmc", "retrofit", str(recipe)),
    )
    assert ended.returncode == 1
    line = f"megatron-dmc: recipe {recipe}: model.num_layers"
    lines = ended.stderr.splitlines()
    assert sum(text.startswith(line) for text in lines) == 1, ended.stderr
    # The last of torchrun's report, but for its frame.
    assert lines[-2].startswith(f"  traceback : {line}") and set(lines[-1]) == {"="}
