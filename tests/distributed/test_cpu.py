"""The shim for machines without CUDA: Megatron sees a GPU, all other code sees plain torch."""

import sys
import types

import pytest
import torch

from megatron_dmc.distributed import cpu

pytestmark = pytest.mark.skipif(torch.cuda.is_available(), reason="the shim does nothing where CUDA is available")


@pytest.fixture(autouse=True)
def installed() -> None:
    cpu.install()


def test_cuda_literals_mean_the_cpu() -> None:
    assert torch.zeros(2, device="cuda").device.type == "cpu"
    assert torch.tensor([1.0], device=torch.device("cuda", 0), pin_memory=True).device.type == "cpu"
    assert torch.empty_like(torch.ones(2), device="cuda").device.type == "cpu"
    assert torch.empty(2, device=torch.cuda.current_device()).device.type == "cpu"
    assert torch.ones(2).cuda(non_blocking=True).tolist() == [1.0, 1.0]
    event = torch.cuda.Event(enable_timing=True)
    event.record()
    assert event.elapsed_time(torch.cuda.Event()) == 0.0


def test_installing_twice_changes_nothing() -> None:
    before = (torch.zeros, torch.Tensor.type, torch.cuda.synchronize)
    cpu.install()
    assert before == (torch.zeros, torch.Tensor.type, torch.cuda.synchronize)


def test_type_names_cuda_to_megatron_only() -> None:
    megatron_like = types.ModuleType("megatron.core.some_module")
    exec("def type_of(tensor): return tensor.type()", megatron_like.__dict__)
    assert megatron_like.type_of(torch.ones(1)) == "torch.cuda.FloatTensor"
    assert torch.ones(1).type() == "torch.FloatTensor"
    assert torch.ones(1).type(torch.float64).dtype == torch.float64


def test_torch_device_context_still_holds() -> None:
    with torch.device("meta"):
        assert torch.zeros(2).device.type == "meta"
        assert torch.nn.Linear(2, 2).weight.device.type == "meta"
        assert torch.zeros(2, device="cpu").device.type == "cpu"


def test_scripted_code_still_compiles() -> None:
    def two() -> torch.Tensor:
        return torch.zeros(2)

    assert torch.jit.script(two)().tolist() == [0.0, 0.0]


def test_no_torch_function_mode_is_left_active() -> None:
    assert torch.overrides._get_current_function_mode_stack() == []


def test_random_states_of_megatron_are_the_cpu_generator() -> None:
    from megatron.core.tensor_parallel import random

    torch.cuda.manual_seed(7)
    state = random._get_cuda_rng_state()
    first = torch.rand(3)
    random._set_cuda_rng_state(state)
    assert torch.equal(torch.rand(3), first)


def test_importing_the_shim_imports_no_megatron() -> None:
    source = sys.modules[cpu.__name__]
    assert not any(name.startswith("megatron") for name in vars(source))


def test_torch_compile_can_still_be_imported_and_used() -> None:
    function = torch.compile(lambda x: x + torch.ones(2), backend="eager")
    assert function(torch.ones(2)).tolist() == [2.0, 2.0]
