"""The attention benchmark times what the names of its rows say."""

from types import ModuleType

import pytest
import torch
from torch import Tensor

from megatron_dmc.ops.attention import windowed_dmc_attention
from tests.support.oracle import takes_omega
from tests.support.scripts import load_benchmark

# A first block, groups of two and of one, and a rest: every case of the sliding window's CPU form.
SEQ, WINDOW = 1100, 256

ORACLES = {
    "free channel": {"local_window": 0},
    "no free channel": {"local_window": 0},
    "window, merge, free channel": {"local_window": WINDOW, "operation": "merge"},
    "window, merge, no free channel": {"local_window": WINDOW, "operation": "merge"},
    "window, evict, free channel": {"local_window": WINDOW, "operation": "evict"},
    "window, evict, no free channel": {"local_window": WINDOW, "operation": "evict"},
    "window, absorb, free channel": {"local_window": WINDOW, "operation": "absorb"},
    "window, absorb, no free channel": {"local_window": WINDOW, "operation": "absorb"},
    "dense mask": {"local_window": 0},
}


@pytest.fixture
def attention(monkeypatch: pytest.MonkeyPatch) -> ModuleType:
    return load_benchmark("attention", monkeypatch)


def gradients(tensors: list[Tensor]) -> list[Tensor]:
    return [torch.zeros_like(x) if x.grad is None else x.grad for x in tensors]


@pytest.mark.parametrize("form", ORACLES)
def test_every_form_equals_its_oracle(attention: ModuleType, form: str) -> None:
    *tensors, direction = attention.inputs(SEQ, 2, 16)
    attention.step(form, *tensors, direction)
    exact = [x.detach().double().requires_grad_() for x in tensors]
    read = exact if ORACLES[form].get("operation") == "absorb" else exact[:6]
    expected = takes_omega(windowed_dmc_attention)(*read, backend="naive", **ORACLES[form])
    expected.backward(direction.double())
    torch.testing.assert_close(attention.attend(form, *tensors).double(), expected, rtol=1e-5, atol=1e-5)
    names = ("query", "key", "value", "pooled_key", "pooled_value", "merge_logits", "omega")
    for name, got, wanted in zip(names, gradients(tensors), gradients(exact), strict=True):
        if name == "merge_logits" and form == "dense mask":  # that form gives none
            continue
        assert (got.double() - wanted).norm() <= 1e-5 * wanted.norm(), name


def test_all_forms_but_the_plain_one_are_covered(attention: ModuleType) -> None:
    assert set(attention.FORMS) == {"plain", *ORACLES}
    assert attention.LOCAL_WINDOW == WINDOW


def test_a_peak_counts_slots_that_are_tensors_of_their_own(attention: ModuleType) -> None:
    """Merging with a window reads raw keys and slots: two tensors and two gradients more than evicting."""
    seq, heads, head_dim = 2048, 4, 64
    shape = ["--seq", str(seq), "--heads", str(heads), "--head-dim", str(head_dim), "--threads", "1"]
    merge, evict = (
        int(
            attention.common.in_own_process(
                attention.__file__, ["--peak", f"window, {operation}, free channel", *shape]
            )
        )
        for operation in ("merge", "evict")
    )
    tensor = 4 * seq * heads * head_dim
    assert tensor < merge - evict < 5 * tensor
