"""A step of single tokens asks the device for nothing: its numbers here lie on a device whose tensors have no values."""

from collections.abc import Callable
from typing import Any, NamedTuple

import pytest
import torch
from torch import Tensor

from megatron_dmc.ops.decode.triton_launch import Launch

REQUESTS, HEADS, WIDTH, BLOCKS, LAYERS, PAGE = 4, 2, 32, 10, 2, 16
DEVICE = torch.device("meta")


class Common(NamedTuple):
    """vLLM's CommonAttentionMetadata, of which no host copy of a length may be read."""

    block_table_tensor: Tensor
    seq_lens: Tensor
    num_reqs: int
    query_start_loc_cpu: Tensor
    max_query_len: int = 1


class Layer:
    layer_name = "layers.1"

    def __init__(self, operation: Any) -> None:
        from megatron_dmc.serving.header import Header
        from megatron_dmc.serving.spec import DMCSpec
        from megatron_dmc.serving.worker_cache import WorkerCache

        settings = {"local_window": 4, "operation": operation, "window_size": None, "decision_source": "projection"}
        header = Header.of(settings, WIDTH, 200, PAGE, dtype=torch.bfloat16)
        self.rotary = None  # the kernels' path does not ask for it
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


def moved(x: Any) -> Any:
    """A tensor, or a tuple of some, as if it had been made on the device."""
    if isinstance(x, Tensor):
        return torch.empty_strided(x.shape, x.stride(), dtype=x.dtype, device=DEVICE)
    return type(x)(*map(moved, x)) if isinstance(x, tuple) else x


@pytest.mark.parametrize("operation", ["merge", "evict", "absorb"])
def test_a_step_of_single_tokens_reads_nothing_back(monkeypatch: pytest.MonkeyPatch, operation: str) -> None:
    from megatron_dmc.serving import kernels, reports
    from megatron_dmc.serving.backend import DMCImpl, DMCMetadataBuilder
    from megatron_dmc.serving.decoding import DecodingBuffers

    monkeypatch.setitem(kernels.OF_DEVICES, "cpu", kernels.TRITON)
    launched: list[str] = []
    monkeypatch.setattr(Launch, "run", lambda self: launched.append(self.body.__name__))
    monkeypatch.setattr("megatron_dmc.ops.decode.triton._processors", lambda _: 132)
    monkeypatch.setattr(reports, "to_host", lambda numbers: numbers.shape)
    layer = Layer(operation)
    cache, builder = layer.cache, DMCMetadataBuilder.__new__(DMCMetadataBuilder)
    builder.kv_cache_spec = layer.spec
    cache.memories = {name: moved(memory) for name, memory in cache.memories.items()}
    cache.blocks, cache.granted.lists = moved(cache.blocks), moved(cache.granted.lists)
    cache.thresholds = moved(cache.thresholds)
    builder.buffers = DecodingBuffers(REQUESTS, 4, torch.empty(200, WIDTH, device=DEVICE), torch.bfloat16)
    table, lengths = (torch.empty(size, dtype=torch.int32, device=DEVICE) for size in ((REQUESTS, 3), (REQUESTS,)))
    common = Common(table, lengths, REQUESTS, torch.empty(REQUESTS + 1, dtype=torch.int32))
    query = torch.empty(REQUESTS, 6, WIDTH, dtype=torch.bfloat16, device=DEVICE)
    key = torch.empty(REQUESTS, HEADS, WIDTH + 4, dtype=torch.bfloat16, device=DEVICE)
    value, out = torch.empty_like(key[..., :WIDTH]), torch.empty_like(query)
    metadata = builder.build(0, common)
    DMCImpl().forward(layer, query, key, value, query, metadata, output=out)
    cache.firsts = cache.places = torch.empty(2, dtype=torch.int64, device=DEVICE)
    cache.reports()
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


@pytest.mark.parametrize("read", [Tensor.tolist, Tensor.item, Tensor.cpu, Tensor.nonzero, bool, int], ids=str)
def test_a_host_read_would_be_seen(read: Callable[[Tensor], Any]) -> None:
    with pytest.raises((NotImplementedError, RuntimeError), match="meta"):
        read(torch.empty(1, device=DEVICE))


def test_a_layer_without_a_cache_is_an_error_in_a_step_only(monkeypatch: pytest.MonkeyPatch) -> None:
    """Before there is one, vLLM captures graphs to measure their memory."""
    from megatron_dmc.serving import backend

    layer = Layer("merge")
    layer.cache, out = None, torch.ones(1, 2, WIDTH)
    metadata = backend.DMCMetadata(None, [])
    backend.DMCImpl().forward(layer, out, out, out, out, metadata, output=out)
    assert not out.any()
    monkeypatch.setattr(backend, "_is_a_step", lambda: True)
    with pytest.raises(RuntimeError, match=r"layers\.1 was given no cache"):
        backend.DMCImpl().forward(layer, out, out, out, out, metadata, output=out)
