"""The CUDA kernels' calls for packed documents, on tensors without memory: shapes and arguments, not numbers."""

from typing import Any

import pytest
import torch
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode

from megatron_dmc.ops.attention.documents import Documents
from megatron_dmc.ops.attention.flash_cuda import cuda_backward, cuda_forward
from megatron_dmc.ops.attention.types import BiasedKeys, KernelSettings

TOKENS, HEADS, KV_HEADS, HEAD_DIM = 24, 4, 2, 16


class Calls(TorchDispatchMode):
    """The flash kernels' arguments and settings."""

    def __init__(self) -> None:
        super().__init__()
        self.made: list[tuple[str, tuple[Any, ...], dict[str, Any]]] = []

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        if "flash_attention" in str(func):
            self.made.append((str(func).split(".")[1], args, kwargs or {}))
        return func(*args, **(kwargs or {}))


def without_memory(*shape: int, dtype: torch.dtype = torch.bfloat16) -> Tensor:
    return torch.empty(*shape, dtype=dtype, device="meta")


@pytest.mark.parametrize(
    ("channel", "biased", "window", "width"),
    [(None, True, None, HEAD_DIM + 8), (-1, True, None, HEAD_DIM), (None, False, 5, HEAD_DIM)],
    ids=["projection", "neuron", "near"],
)
def test_documents_are_one_call(channel: int | None, biased: bool, window: int | None, width: int) -> None:
    query, grad = (without_memory(1, TOKENS, HEADS, HEAD_DIM) for _ in range(2))
    key, value = (without_memory(1, TOKENS, KV_HEADS, HEAD_DIM) for _ in range(2))
    bias = without_memory(1, TOKENS, KV_HEADS, dtype=torch.float32) if biased else None
    documents = Documents(without_memory(4, dtype=torch.int32), TOKENS, 12)
    keys, settings = BiasedKeys(key, value, bias), KernelSettings(0.25, True, window, channel, documents)
    with Calls() as calls:
        attended = cuda_forward(query, keys, settings)
        gradients = cuda_backward(grad, query, keys, attended, settings)
    assert attended.out.shape == query.shape and attended.lse.shape == query.shape[:3]
    assert [x.shape for x in gradients[:3]] == [x.shape for x in (query, key, value)]
    assert (gradients.bias is not None) == biased and (bias is None or gradients.bias.shape == bias.shape)

    (forward, forward_arguments, options), (backward, backward_arguments, _) = calls.made
    assert (forward, backward) == ("_flash_attention_forward", "_flash_attention_backward")
    assert [tuple(x.shape) for x in forward_arguments[:3]] == [
        (TOKENS, heads, width) for heads in (HEADS, KV_HEADS, KV_HEADS)
    ]
    *states, heads_first = backward_arguments[:6]
    assert [len(x) for x in states] == [TOKENS] * 5 and tuple(heads_first.shape) == (HEADS, TOKENS)
    for places in (forward_arguments[3:7], backward_arguments[6:10]):
        assert places[0] is places[1] is documents.cu_seqlens and tuple(places[2:]) == (12, 12)
    assert options.get("window_size_left") == (None if window is None else window - 1)
