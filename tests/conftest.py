"""What all tests share: one thread per process, and megatron-core in this process alone."""

import os
from collections.abc import Iterator

# The tests are the CPU's, also where there is a GPU (make gpu-check is the GPU's). Before torch is imported.
os.environ["CUDA_VISIBLE_DEVICES"] = ""

import pytest
import torch

from megatron_dmc.convert.single_process import single_process


@pytest.fixture(scope="session", autouse=True)
def one_thread() -> None:
    torch.set_num_threads(1)


@pytest.fixture(scope="session")
def one_process() -> Iterator[None]:
    """torch.distributed and megatron-core's parallel state, a world of one."""
    with single_process():
        yield
