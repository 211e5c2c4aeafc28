"""A process's place among those that a launcher started."""

from collections.abc import Mapping
from dataclasses import dataclass

from megatron_dmc.config import ConfigError


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


def number(environment: Mapping[str, str], name: str, reason: str, remedy: str) -> int:
    """A variable that a launcher sets; ``reason`` says why it must be there, and begins the error's line."""
    value = environment.get(name)
    if value is None or not (value.isascii() and value.isdecimal()):
        is_now = "not set" if value is None else f"{value!r}, not a number"
        raise ConfigError(f"{reason}, but {name} is {is_now}; {remedy}")
    return int(value)


def master_port(environment: Mapping[str, str], reason: str, remedy: str) -> int:
    """``MASTER_PORT``; raises ConfigError for what is no port."""
    port = number(environment, "MASTER_PORT", reason, remedy)
    if not 0 < port < 2**16:
        raise ConfigError(f"{reason}, but MASTER_PORT is {port}, not a port (1 to {2**16 - 1}); {remedy}")
    return port
