"""What all tests share: one thread per process, Ctrl-C as in a terminal, and megatron-core in this one process."""

import importlib.util
import os
import signal
from collections.abc import Iterator

# The tests are the CPU's, also where there is a GPU (make gpu-check is the GPU's). Before torch is imported.
os.environ["CUDA_VISIBLE_DEVICES"] = ""
# Several processes share the cores: a thread that has nothing to do must not keep one busy while it waits.
os.environ.setdefault("OMP_WAIT_POLICY", "PASSIVE")
# Triton's kernels run in its interpreter. It reads this when it is imported, whoever imports it first; vLLM has kernels of its
# own, which it does not want interpreted.
if importlib.util.find_spec("vllm") is None:
    os.environ["TRITON_INTERPRET"] = "1"

import pytest
import torch


@pytest.fixture(scope="session", autouse=True)
def one_thread() -> None:
    torch.set_num_threads(1)


@pytest.fixture(scope="session", autouse=True)
def ctrl_c_interrupts() -> None:
    """A shell's job in the background ignores Ctrl-C, and so would the processes that tests start and interrupt."""
    if signal.getsignal(signal.SIGINT) == signal.SIG_IGN:
        signal.signal(signal.SIGINT, signal.default_int_handler)


@pytest.fixture(scope="session")
def one_process() -> Iterator[None]:
    """torch.distributed and megatron-core's parallel state, a world of one."""
    # Here, because tests/serving runs where megatron-core is not installed.
    from megatron_dmc.convert.single_process import single_process

    with single_process():
        yield
