"""A process's place among those that a launcher started."""

from collections.abc import Mapping
from dataclasses import dataclass

from megatron_dmc.config import MOST, ConfigError, Range

# Python reads no number of thousands of digits; SLURM writes ten at most.
_MOST_DIGITS = 100


@dataclass(frozen=True)
class Task:
    """One of several processes.

    Attributes:
        rank: among all of them.
        world_size: how many there are.
        local_rank: among those of this node.
        host, port: where they meet; rank 0 listens there, or torchrun's own process where ``agent_listens``.
    """

    rank: int
    world_size: int
    local_rank: int
    host: str
    port: int
    agent_listens: bool = False

    def __post_init__(self) -> None:
        # torch counts processes with int32.
        Range(1, MOST).check("the number of processes (WORLD_SIZE, SLURM_STEP_NUM_TASKS)", self.world_size)


def number(environment: Mapping[str, str], name: str, reason: str, remedy: str) -> int:
    """A variable that a launcher sets; ``reason`` says why it must be there, and begins the error's line."""
    value = environment.get(name)
    if value is None or not (value.isascii() and value.isdecimal() and len(value) <= _MOST_DIGITS):
        is_now = "not set" if value is None else f"{value!r}, not a number"
        raise ConfigError(f"{reason}, but {name} is {is_now}; {remedy}")
    return int(value)


def master_port(environment: Mapping[str, str], reason: str, remedy: str) -> int:
    """``MASTER_PORT``; raises ConfigError for what is no port."""
    port = number(environment, "MASTER_PORT", reason, remedy)
    if not 0 < port < 2**16:
        raise ConfigError(f"{reason}, but MASTER_PORT is {port}, not a port (1 to {2**16 - 1}); {remedy}")
    return port
