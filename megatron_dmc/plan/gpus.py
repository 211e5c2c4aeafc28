"""GPUs by name, as their makers' data sheets describe them. Nothing here was measured."""

from dataclasses import dataclass

from megatron_dmc.config import ConfigError

# Part of the memory: the CUDA context, NCCL's buffers, workspaces of kernels other than attention's, and what the allocator
# loses between blocks.
RESERVE = 0.1


@dataclass(frozen=True)
class GPU:
    """One accelerator.

    Attributes:
        label: as it is printed.
        memory: bytes.
        peak_flops: dense bf16, per second.
        link: bytes per second that it sends to the GPUs of its node (NVLink, one direction).
        network: bytes per second that it sends to other nodes, with one adapter per GPU as its makers' servers have.
    """

    label: str
    memory: float
    peak_flops: float
    link: float
    network: float

    @property
    def usable(self) -> float:
        """Bytes that a plan may fill."""
        return (1 - RESERVE) * self.memory


GPUS = {
    "a100-40": GPU("A100 40 GB", 40e9, 312e12, 300e9, 25e9),
    "a100-80": GPU("A100 80 GB", 80e9, 312e12, 300e9, 25e9),
    "h100": GPU("H100 80 GB", 80e9, 989e12, 450e9, 50e9),
    "h200": GPU("H200 141 GB", 141e9, 989e12, 450e9, 50e9),
    "b200": GPU("B200 180 GB", 180e9, 2250e12, 900e9, 50e9),
}


def find_gpu(name: str) -> GPU:
    """Raises ConfigError for a name that is not in the table."""
    if name.lower() not in GPUS:
        raise ConfigError(f"--gpu must be one of {', '.join(GPUS)}, got {name!r}")
    return GPUS[name.lower()]
