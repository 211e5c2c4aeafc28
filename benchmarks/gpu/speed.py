"""Time, kernels and memory: of one layer's operations, and of decoding."""

import copy
import dataclasses
import functools

import torch
from torch import Tensor
from torch.nn.attention import SDPBackend, sdpa_kernel

from gpu.inputs import attention_forms, attention_inputs, decode_forms, dmc_form, plain_attention, pooling_inputs
from gpu.measure import Call, backpropagation, error_of, interleaved, time_rows
from gpu.run import Run
from gpu.sizes import DTYPE
from megatron_dmc.ops.attention.types import Operation
from megatron_dmc.ops.decode import LayerCache
from megatron_dmc.ops.pooling import pool

# What ours is measured against. Ours calls torch's flash kernels; what torch picks by itself may be another.
NAMED_KERNELS = {"flash": SDPBackend.FLASH_ATTENTION, "cudnn": SDPBackend.CUDNN_ATTENTION}


def speed(run: Run) -> None:
    """Forward and backward of attention in every form and of pooling, over plain attention by each named kernel."""
    for seq, kv_heads in run.sizes.timed:
        run.attempt(f"{seq} tokens, {kv_heads} KV heads", functools.partial(_time_layer, run, seq, kv_heads), 5)


def _time_layer(run: Run, seq: int, kv_heads: int) -> None:
    sizes = dataclasses.replace(run.sizes, kv_heads=kv_heads)
    leaves = [x.requires_grad_() for x in attention_inputs(seq, sizes, run.device, hard=False, free=True)]
    grad = torch.randn_like(leaves[0])
    plain = backpropagation(plain_attention, leaves[:3], [grad])
    named = {name: _with_kernel(backend, plain) for name, backend in NAMED_KERNELS.items()}
    for name, call in list(named.items()):
        if reason := error_of(call):
            run.row("note", kernel=name, seq=seq, kv_heads=kv_heads, not_available=reason)
            del named[name]
    pooled = [x.requires_grad_() for x in pooling_inputs(seq, sizes, run.device)]
    ours = {
        name: backpropagation(functools.partial(dmc_form, **options), leaves, [grad])
        for name, options in attention_forms(sizes).items()
    }
    ours["pooling"] = backpropagation(pool, pooled, [torch.randn_like(pooled[0]) for _ in range(2)])
    time_rows(run, named | {"torch's choice": plain} | ours, list(named), seq=seq, kv_heads=kv_heads)


def _with_kernel(backend: SDPBackend, call: Call) -> Call:
    def named() -> object:
        with sdpa_kernel([backend]):
            return call()

    return named


def decode_speed(run: Run) -> None:
    """A token through a full cache, over plain attention to as many tokens that were never compressed."""
    window = run.sizes.local_window
    forms: tuple[tuple[int, Operation], ...] = ((0, "merge"), (window, "merge"), (window, "absorb"))
    for batch, context in run.sizes.decoded:
        for local_window, operation in forms:
            name = f"{context} tokens, batch {batch}, window {local_window}, {operation}"
            run.attempt(name, functools.partial(_time_decoding, run, batch, context, local_window, operation))


@torch.no_grad()
def _time_decoding(run: Run, batch: int, context: int, local_window: int, operation: Operation) -> None:
    prompt, token = _tokens(run, batch, context), _tokens(run, batch, 1)
    cache = LayerCache(local_window, operation)

    def prefill() -> None:
        cache.reset()
        cache.attend(*prompt)

    prefilled = interleaved({"prefill": prefill}, 3, run.device)["prefill"].medians()["ms"]
    compressed, plain_bytes = cache.nbytes, sum(x.nbytes for x in prompt[1:3])
    query, key, value = token[0], *prompt[1:3]
    functions: dict[str, Call] = {"plain": lambda: plain_attention(query, key, value, causal=False)}
    for form in decode_forms(run.device):
        functions[f"cache, {form}"] = functools.partial(_of_form(cache, form).attend, *token)
        if run.device == "cuda":
            functions[f"cache, {form}, graph"] = _captured(_of_form(cache, form), token)
    content = {
        "batch": batch,
        "context": context,
        "window": local_window,
        "operation": operation,
        "prefill_ms": prefilled,
        "cache_mib": round(compressed / 2**20, 2),
        "plain_mib": round(plain_bytes / 2**20, 2),
    }
    time_rows(run, functions, ["plain"], **content)


def _of_form(cache: LayerCache, form: str) -> LayerCache:
    """A copy that takes steps in this form, with room for all that will be timed."""
    copied = copy.deepcopy(cache)
    copied.backend = form
    copied.reserve(4096)
    return copied


def _captured(cache: LayerCache, token: list[Tensor]) -> Call:
    """One step as a CUDA graph: what a serving engine launches."""
    for _ in range(3):
        cache.attend(*token)
    torch.cuda.synchronize()
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        cache.attend(*token)
    return graph.replay


def _tokens(run: Run, batch: int, count: int) -> list[Tensor]:
    """Arguments of LayerCache.attend; three in four tokens are merged. The rotation is by no angle: it costs the same."""
    sizes, device = run.sizes, run.device
    shape = (batch, count, sizes.kv_heads)
    query, key, value = (
        torch.randn(batch, count, heads, sizes.head_dim, device=device, dtype=DTYPE)
        for heads in (sizes.heads, sizes.kv_heads, sizes.kv_heads)
    )
    decisions = [torch.rand(shape, device=device) < 0.75, torch.rand(shape, device=device) + 0.1]
    angles = torch.zeros(1, count, 1, sizes.head_dim, device=device, dtype=DTYPE)
    return [query, key, value, *decisions, angles.cos(), angles.sin()]
