"""A step of single tokens asks the device for nothing: its numbers here are CUDA tensors without memory or values."""

from typing import Any, NamedTuple

import pytest
import torch
from torch import Tensor
from torch._subclasses.fake_tensor import DataDependentOutputException, DynamicOutputShapeException, FakeTensorMode
from torch.utils._python_dispatch import TorchDispatchMode

from megatron_dmc.ops.decode.triton_launch import Launch

REQUESTS, HEADS, WIDTH, BLOCKS, LAYERS, PAGE = 4, 2, 32, 10, 2, 16
DEVICE = torch.device("cuda")


class Common(NamedTuple):
    """vLLM's CommonAttentionMetadata, of which no host copy of a length may be read."""

    block_table_tensor: Tensor
    seq_lens: Tensor
    num_reqs: int
    query_start_loc_cpu: Tensor
    max_query_len: int = 1


class StaysOnTheDevice(TorchDispatchMode):
    def __torch_dispatch__(self, function: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        out = function(*args, **(kwargs or {}))
        came = any(isinstance(x, Tensor) and x.is_cuda for x in args)
        if came and isinstance(out, Tensor) and not out.is_cuda:
            raise AssertionError(f"{function} copies from the device")
        return out


class Layer:
    layer_name = "layers.1"

    def __init__(self, operation: Any) -> None:
        from megatron_dmc.serving.header import Header
        from megatron_dmc.serving.spec import DMCSpec
        from megatron_dmc.serving.worker_cache import WorkerCache

        settings = {"local_window": 4, "operation": operation, "window_size": None, "decision_source": "projection"}
        header = Header.of(settings, WIDTH, 200, PAGE)
        self.rotary = self
        self.cos_sin_cache = torch.empty(200, WIDTH, device=DEVICE)
        self.spec = DMCSpec(
            block_size=PAGE,
            num_kv_heads=HEADS,
            head_size=WIDTH,
            dtype=torch.bfloat16,
            local_window=4,
            longest=200,
            by_kernels=True,
        )
        pool = torch.empty(BLOCKS, LAYERS, HEADS, PAGE, 2 * WIDTH, dtype=torch.bfloat16, device="cpu")
        # Addresses tell layers apart, and only memory has them.
        views = {f"layers.{i}": pool[:, i] for i in range(LAYERS)}
        self.cache = WorkerCache(views, header, self.spec, REQUESTS)


def on_the_device(layer: Layer, mode: FakeTensorMode) -> None:
    """As if the cache had been made there."""
    cache = layer.cache

    def moved(x: Any) -> Any:
        if isinstance(x, Tensor):
            fake = torch.empty_strided(x.shape, x.stride(), dtype=x.dtype, device=DEVICE)
            return fake
        return type(x)(*map(moved, x)) if isinstance(x, tuple) else x

    cache.memories = {name: moved(memory) for name, memory in cache.memories.items()}
    cache.blocks, cache.granted.lists = moved(cache.blocks), moved(cache.granted.lists)


@pytest.mark.parametrize("operation", ["merge", "evict", "absorb"])
def test_a_step_of_single_tokens_reads_nothing_back(monkeypatch: pytest.MonkeyPatch, operation: str) -> None:
    from megatron_dmc.serving import reports
    from megatron_dmc.serving.backend import DMCImpl, DMCMetadataBuilder

    launched: list[str] = []
    monkeypatch.setattr(Launch, "run", lambda self: launched.append(self.body.__name__))
    monkeypatch.setattr("megatron_dmc.ops.decode.triton._processors", lambda _: 132)
    monkeypatch.setattr(reports, "to_host", lambda numbers: numbers.shape)
    layer = Layer(operation)
    with FakeTensorMode() as mode:
        on_the_device(layer, mode)
        layer.cos_sin_cache = torch.empty(200, WIDTH, device=DEVICE)
        builder = DMCMetadataBuilder.__new__(DMCMetadataBuilder)
        from megatron_dmc.serving.decoding import DecodingBuffers

        builder.buffers = DecodingBuffers(REQUESTS, 4, layer.cos_sin_cache, torch.bfloat16)
        numbers = torch.empty(2, REQUESTS, 3, dtype=torch.int32, device=DEVICE)
        common = Common(numbers[0], numbers[1, :, 0].contiguous(), REQUESTS, torch.empty(REQUESTS + 1))
        query = torch.empty(REQUESTS, 6, WIDTH, dtype=torch.bfloat16, device=DEVICE)
        key = torch.empty(REQUESTS, HEADS, WIDTH + 2, dtype=torch.bfloat16, device=DEVICE)
        value, out = torch.empty(REQUESTS, HEADS, WIDTH, dtype=torch.bfloat16, device=DEVICE), torch.empty_like(query)
        with StaysOnTheDevice():
            metadata = builder.build(0, common)
            DMCImpl().forward(layer, query, key, value, query, metadata, output=out)
            layer.cache.scheduled = [1, 2]
            layer.cache.firsts = layer.cache.places = torch.empty(2, dtype=torch.int64, device=DEVICE)
            layer.cache.reports()
        assert metadata.decoding is not None and metadata.decoding.tokens.data_ptr is not None
        # What this test would see.
        with pytest.raises((DataDependentOutputException, DynamicOutputShapeException)):
            int(common.seq_lens.max())
        with StaysOnTheDevice(), pytest.raises(AssertionError, match="copies from the device"):
            common.seq_lens.cpu()
        with pytest.raises((DataDependentOutputException, DynamicOutputShapeException)):
            builder._requests(common, 0)
    assert launched == ["advance", "attend", "join"]


def test_a_graph_finds_every_step_at_the_same_addresses() -> None:
    """And what fills it up is no request: vLLM's null block, and lengths of 0."""
    from megatron_dmc.serving.decoding import DecodingBuffers

    angles = torch.rand(20, 8)
    buffers = DecodingBuffers(REQUESTS, 3, angles, torch.float32)
    first = buffers.filled(torch.tensor([5, 6, 0]), torch.tensor([9, 2, 1], dtype=torch.int32))
    assert first.tokens.tolist() == [9, 2, 0] and first.place.tolist() == [5, 6, 0]
    torch.testing.assert_close(first.cos[0], angles[8, :4].repeat(2))
    torch.testing.assert_close(first.sin[1], angles[1, 4:].repeat(2))
    torch.testing.assert_close(first.leaving_cos[0], angles[5, :4].repeat(2))
    second = buffers.filled(torch.tensor([7, 0, 0]), torch.tensor([10, 0, 0], dtype=torch.int32))
    for name in ("tokens", "place", "cos", "sin", "leaving_cos", "leaving_sin"):
        assert getattr(first, name).data_ptr() == getattr(second, name).data_ptr()
    assert first.tokens.tolist() == [10, 0, 0]
