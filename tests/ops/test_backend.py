"""One choice of implementation for all operations."""

from collections.abc import Callable
from typing import Any

import pytest
import torch

from megatron_dmc.ops.attention import dmc_attention, windowed_dmc_attention
from megatron_dmc.ops.backend import choose
from megatron_dmc.ops.later_attention import Tokens, later_attention
from megatron_dmc.ops.noise import logistic_noise
from megatron_dmc.ops.pooling import pool
from megatron_dmc.ops.residual import residual
from tests.support.oracle import Shape, draw_attention, draw_pooling


def test_auto_takes_the_first_and_a_name_its_own() -> None:
    implementations = {"triton": 1, "torch": 2, "naive": 3}
    assert [choose(name, implementations) for name in ("auto", "triton", "torch", "naive")] == [1, 1, 2, 3]
    with pytest.raises(ValueError, match=r"^backend must be auto, triton, torch or naive, got 'cuda'$"):
        choose("cuda", implementations)


ATTENTION = draw_attention(Shape(1, 5, 2, 2, 8))
OPERATIONS: dict[str, Callable[..., Any]] = {
    "dmc_attention": lambda **options: dmc_attention(
        *(ATTENTION[name] for name in ("query", "key", "value", "merge_logits")), **options
    ),
    "windowed_dmc_attention": lambda **options: windowed_dmc_attention(**ATTENTION, local_window=2, **options),
    "residual": lambda **options: residual(
        ATTENTION["key"], ATTENTION["value"], torch.sigmoid(ATTENTION["merge_logits"]), **options
    ),
    "pool": lambda **options: pool(**draw_pooling(Shape(1, 5, 2, 2, 8)), **options),
    "later_attention": lambda **options: later_attention(
        Tokens(ATTENTION["query"], torch.zeros(1, 5), torch.arange(5)),
        Tokens(ATTENTION["key"], torch.zeros(1, 5, 2), torch.arange(5)),
        local_window=1,
        **options,
    ),
    "logistic_noise": lambda **options: logistic_noise(1, torch.tensor([0]), 0, [0], torch.arange(3), **options),
}


@pytest.mark.parametrize("operation", OPERATIONS.values(), ids=OPERATIONS)
def test_every_operation_has_the_same_choice(operation: Callable[..., Any]) -> None:
    for backend in ("auto", "torch", "naive"):
        operation(backend=backend)
    with pytest.raises(ValueError, match=r"^backend must be auto, torch or naive, got 'flash'$"):
        operation(backend="flash")
