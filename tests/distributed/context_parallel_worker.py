"""Runs as ranks: pooling and attention of a cut sequence against the whole one in float64; rank 0 writes all errors."""

import itertools
import json
import math
import sys
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor

from megatron_dmc.ops.attention import Documents, naive
from megatron_dmc.ops.attention.context_parallel import context_parallel_attention
from megatron_dmc.ops.context_parallel import local_positions
from megatron_dmc.ops.pooling import pool
from megatron_dmc.ops.pooling.context_parallel import context_parallel_pool
from tests.support.oracle import takes_omega

BATCH, HEADS, KV_HEADS, HEAD_DIM = 2, 8, 4, 8


def draw(seq: int, seed: int) -> dict[str, Tensor]:
    """Of the whole sequence; a third of the decisions are binary."""
    generator = torch.Generator().manual_seed(seed)

    def normal(*shape: int) -> Tensor:
        return torch.randn(BATCH, seq, *shape, generator=generator, dtype=torch.float64)

    tensors = {"query": normal(HEADS, HEAD_DIM)}
    for name in ("key", "value", "pooled_key", "pooled_value"):
        tensors[name] = normal(KV_HEADS, HEAD_DIM)
    logits = 4 * normal(KV_HEADS)
    binary = torch.rand(logits.shape, generator=generator) < 1 / 3
    tensors["merge_logits"] = torch.where(binary, logits.sign() * math.inf, logits)
    tensors["omega"] = torch.sigmoid(normal(KV_HEADS)) + 2**-7
    return tensors


def run(function: Callable[..., Any], tensors: Sequence[Tensor], mine: Tensor | None) -> list[Tensor]:
    """Outputs and gradients of a projection of them; of the tokens ``mine``, or of all."""

    def local(x: Tensor) -> Tensor:
        return x if mine is None else x[:, mine]

    leaves = [local(x).clone().requires_grad_() for x in tensors]
    result = function(*leaves)
    outputs = [result] if isinstance(result, Tensor) else list(result)
    seq = tensors[0].shape[1]
    generator = torch.Generator().manual_seed(1)
    directions = [
        local(torch.randn(x.shape[0], seq, *x.shape[2:], generator=generator, dtype=torch.float64)) for x in outputs
    ]
    torch.autograd.backward(outputs, directions)
    return [*outputs, *(torch.zeros_like(x) if x.grad is None else x.grad for x in leaves)]


def worst(cut: list[Tensor], whole: list[Tensor], mine: Tensor) -> float:
    """The largest relative error of any output or gradient on any rank."""
    errors = [
        (x - y[:, mine]).norm() / y.norm().clamp(min=0.1) if x.isfinite().all() else torch.tensor(math.inf).double()
        for x, y in zip(cut, whole, strict=True)
    ]
    error = torch.stack(errors).max().detach()
    dist.all_reduce(error, op=dist.ReduceOp.MAX)
    return float(error)


def pooling_errors(seq: int) -> dict[str, float]:
    group, mine = dist.group.WORLD, local_positions(seq // dist.get_world_size(), dist.group.WORLD)
    tensors = draw(seq, 3)
    errors = {}
    for kind in ("mixed", "one", "documents"):
        alpha = torch.sigmoid(tensors["merge_logits"])
        alpha = torch.ones_like(alpha) if kind == "one" else alpha
        starts = torch.zeros(BATCH, seq, dtype=torch.bool)
        if kind == "documents":
            starts[0, [1, seq // 2, seq - 2]] = True
        arguments = [tensors["key"], tensors["value"], alpha, tensors["omega"]]
        whole = run(lambda *x, starts=starts: pool(*x, document_starts=starts, backend="naive"), arguments, None)
        cut = run(
            lambda *x, starts=starts: context_parallel_pool(*x, group=group, document_starts=starts[:, mine]),
            arguments,
            mine,
        )
        errors[f"pooling-{kind}"] = worst(cut, whole, mine)
    return errors


cut_attention = takes_omega(context_parallel_attention)
naive_windowed = takes_omega(lambda *x, **options: naive.windowed_dmc_attention(*x, **options)[0])


def read_by(operation: str) -> list[str]:
    """Names of the tensors that an operation is a function of."""
    names = ["query", "key", "value", "pooled_key", "pooled_value", "merge_logits", "omega"]
    return names[: {"plain": 3, "absorb": 7}.get(operation, 6)]


def attention_errors(seq: int) -> dict[str, float]:
    group, ranks = dist.group.WORLD, dist.get_world_size()
    mine = local_positions(seq // ranks, group)
    errors = {}
    for operation, window, channel in itertools.product(
        ("plain", "merge", "evict", "absorb"), (0, 1, 4, seq // 2 // ranks, 17, seq), (None, -1)
    ):
        if (operation == "plain" and (window or channel)) or (operation in ("evict", "absorb") and window == 0):
            continue
        tensors = draw(seq, window)
        if channel is not None:
            for name in ("query", "key", "pooled_key"):
                tensors[name][..., channel] = 0

        def oracle(*x: Tensor, operation: str = operation, window: int = window) -> Tensor:
            if operation == "plain":
                return naive.dmc_attention(*x, torch.full(x[1].shape[:3], -math.inf, dtype=torch.float64))[0]  # type: ignore[call-arg]
            return naive_windowed(*x, local_window=window, operation=operation)

        arguments = [tensors[name] for name in read_by(operation)]
        whole = run(oracle, arguments, None)
        for exchange in ("all_gather", "a2a"):
            options: dict[str, Any] = {"group": group, "exchange": exchange}
            if operation != "plain":
                options |= {"local_window": window, "operation": operation, "bias_channel": channel}
            cut = run(lambda *x, options=options: cut_attention(*x, **options), arguments, mine)
            if channel is not None:  # its gradient is not the caller's
                for gradients in (cut, whole):
                    for place in (1, 2, 4):
                        gradients[place][..., channel] = 0
            errors[f"{exchange}-{operation}-w{window}-channel{channel}"] = worst(cut, whole, mine)
    return errors


def packed_errors(seq: int) -> dict[str, float]:
    """Packed documents, whose ends lie within chunks and at their ends."""
    group, mine = dist.group.WORLD, local_positions(seq // dist.get_world_size(), dist.group.WORLD)
    starts = torch.zeros(BATCH, seq, dtype=torch.bool)
    starts[0, [1, seq // 4, seq // 2, seq - 2]] = True
    errors = {}
    absorbing = [("absorb", window) for window in (1, 5, seq // 2 // dist.get_world_size(), seq // 3)]
    for operation, window in (("plain", 0), ("merge", 0), ("merge", 3), ("merge", seq // 3), ("evict", 5), *absorbing):
        tensors = draw(seq, window)
        arguments = [tensors[name] for name in read_by(operation)]

        def oracle(*x: Tensor, operation: str = operation, window: int = window) -> Tensor:
            if operation == "plain":
                never = torch.full(x[1].shape[:3], -math.inf, dtype=torch.float64)
                return naive.dmc_attention(*x, never, None, starts)[0]  # type: ignore[call-arg]
            options: dict[str, Any] = {"local_window": window, "operation": operation, "document_starts": starts}
            return naive_windowed(*x, **options)

        whole = run(oracle, arguments, None)
        for exchange in ("all_gather", "a2a"):
            options: dict[str, Any] = {"group": group, "exchange": exchange, "documents": Documents.from_starts(starts)}
            if operation != "plain":
                options |= {"local_window": window, "operation": operation}
            cut = run(lambda *x, options=options: cut_attention(*x, **options), arguments, mine)
            errors[f"{exchange}-{operation}-w{window}-documents"] = worst(cut, whole, mine)
    return errors


def main(seq: int, path: Path) -> None:
    torch.set_num_threads(1)
    dist.init_process_group("gloo")
    errors = pooling_errors(seq) | attention_errors(seq) | packed_errors(seq)
    if dist.get_rank() == 0:
        path.write_text(json.dumps(errors))
    dist.destroy_process_group()


if __name__ == "__main__":
    main(int(sys.argv[1]), Path(sys.argv[2]))
