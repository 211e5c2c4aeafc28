"""Pooling, forward and backward, against plain causal attention on the same tokens and against a running sum.

    python benchmarks/pooling.py

The running sum (torch.cumsum over key and value) is what the fastest possible scan would have to do at least.
"""

import argparse

import common
import torch
import torch.nn.functional as F
from torch import Tensor

from megatron_dmc.ops.pooling import pool


def inputs(seq: int, kv_heads: int, head_dim: int) -> tuple[list[Tensor], Tensor]:
    """key, value, alpha (half 0 or 1, half soft), omega; the gradient of either output."""
    torch.manual_seed(0)
    key, value, grad = (torch.randn(1, seq, kv_heads, head_dim) for _ in range(3))
    merge_logits = 10 * torch.randn(1, seq, kv_heads) + 5
    alpha = torch.where(torch.rand_like(merge_logits) < 0.5, (merge_logits > 0).float(), torch.sigmoid(merge_logits))
    omega = torch.sigmoid(torch.randn(1, seq, kv_heads)) + 2**-7
    return [x.requires_grad_() for x in (key, value, alpha, omega)], grad


def measure(seq: int, options: argparse.Namespace) -> dict:
    leaves, grad = inputs(seq, options.heads, options.head_dim)
    key, value, alpha, omega = leaves
    key_heads, value_heads = key.transpose(1, 2), value.transpose(1, 2)

    def pooling() -> None:
        torch.autograd.grad(pool(key, value, alpha, omega), leaves, [grad, grad])

    def window() -> None:
        torch.autograd.grad(pool(key, value, alpha, omega, window_size=12), leaves, [grad, grad])

    def running_sum() -> None:
        torch.autograd.grad([key.cumsum(1), value.cumsum(1)], [key, value], [grad, grad])

    def attention() -> None:
        out = F.scaled_dot_product_attention(key_heads, key_heads, value_heads, is_causal=True)
        torch.autograd.grad(out, [key, value], grad.transpose(1, 2))

    steps = {"attention": attention, "pooling": pooling, "window 12": window, "running sum": running_sum}
    seconds = common.interleaved_seconds(steps, options.rounds, options.clock)
    ratios = common.ratio_to("attention", seconds)
    sums = common.ratio_to("running sum", seconds)
    return {
        "seq": seq,
        "pooling ms": common.median_ms(seconds["pooling"]),
        "over attention": ratios["pooling"],
        "window 12 over attention": ratios["window 12"],
        "over running sum": sums["pooling"],
    }


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    common.add_operation_options(parser)
    common.add_timing_options(parser)
    options = parser.parse_args()
    torch.set_num_threads(options.threads)
    rows = [measure(seq, options) for seq in options.seq]
    title = "pooling, forward + backward, float32"
    common.report("pooling", title, rows, clock=options.clock, heads=options.heads, head_dim=options.head_dim)


if __name__ == "__main__":
    main()
