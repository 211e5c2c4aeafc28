"""Numbers and speed on a CUDA device: attention, pooling and a bf16 retrofit step against float64 and plain flash attention.

    PYTHONPATH=. python benchmarks/gpu_check.py

Needs torch and megatron-core. Without a CUDA device it says so and exits 0; it exits 1 when an error bound is exceeded.
``--device cpu`` runs the same comparisons at toy size, to check the checks.
"""

import argparse
import dataclasses
import functools
import os
import sys
from collections.abc import Callable, Sequence
from typing import Any

import common
import torch
import torch.nn.functional as F
from torch import Tensor

from megatron_dmc.ops.attention import dmc_attention, windowed_dmc_attention
from megatron_dmc.ops.pooling import pool

DTYPE = torch.bfloat16
# Relative errors in the Euclidean norm. bf16 has 8 bits: rounding alone gives 2e-3.
OUTPUT_BOUND = 1e-2
GRADIENT_BOUND = 2e-2
STEP_LOSS_BOUND = 5e-3
# A step's gradient has gone through every layer twice: it is compared with the base model's own bf16 error.
STEP_GRADIENT_FACTOR = 2.0


@dataclasses.dataclass(frozen=True)
class Sizes:
    """What is checked at (float64 references are quadratic) and what is timed."""

    check_seq: int = 1029
    pooling_seq: int = 193
    timed_batch: int = 2
    timed_seq: Sequence[int] = (4096, 16384)
    heads: int = 32
    kv_heads: int = 8
    head_dim: int = 128
    local_window: int = 256
    step_seq: int = 2048
    step_layers: int = 4
    step_hidden: int = 512


TOY = Sizes(97, 65, 1, (128,), 4, 2, 16, 40, 64, 2, 128)
ATTENTION_INPUTS = ("query", "key", "value", "pooled_key", "pooled_value", "merge_logits")


def relative_error(got: Tensor, expected: Tensor) -> float:
    """Of the whole tensor, in the Euclidean norm; infinite if anything is not finite."""
    error = (got.double() - expected.double()).norm() / expected.double().norm().clamp(min=1e-12)
    return float(error) if error.isfinite() else float("inf")


def with_gradients(function: Callable[..., Any], inputs: Sequence[Tensor]) -> tuple[list[Tensor], list[Tensor]]:
    """Outputs, and the inputs' gradients of a fixed projection of them."""
    leaves = [x.detach().clone().requires_grad_() for x in inputs]
    result = function(*leaves)
    outputs = [result] if isinstance(result, Tensor) else list(result)
    generator = torch.Generator().manual_seed(1)
    directions = [torch.randn(x.shape, generator=generator).to(x.device, x.dtype) for x in outputs]
    torch.autograd.backward(outputs, directions)
    return [x.detach() for x in outputs], [torch.zeros_like(x) if x.grad is None else x.grad for x in leaves]


def compare(
    name: str,
    fast: Callable[..., Any],
    reference: Callable[..., Any],
    inputs: Sequence[Tensor],
    names: Sequence[str],
) -> list[dict[str, Any]]:
    """A row per output and gradient: fast in the inputs' dtype, the reference on the same numbers in float64."""
    outputs, gradients = with_gradients(fast, inputs)
    expected_outputs, expected_gradients = with_gradients(reference, [x.double() for x in inputs])
    rows = [
        checked(name, f"output {i}", relative_error(x, y), OUTPUT_BOUND)
        for i, (x, y) in enumerate(zip(outputs, expected_outputs, strict=True))
    ]
    return rows + [
        checked(name, f"d {label}", relative_error(x, y), GRADIENT_BOUND)
        for label, x, y in zip(names, gradients, expected_gradients, strict=True)
    ]


def checked(name: str, quantity: str, error: float, bound: float | None) -> dict[str, Any]:
    """A row of the table; without a bound the error is there to be compared with."""
    return {"check": name, "quantity": quantity, "error": error, "bound": bound, "ok": bound is None or error <= bound}


def attention_inputs(batch: int, seq: int, sizes: Sizes, device: str, hard: bool, free: bool) -> list[Tensor]:
    """ATTENTION_INPUTS; the pooled ones are of their own."""
    generator = torch.Generator().manual_seed(0)

    def draw(heads: int, *head_dim: int) -> Tensor:
        return torch.randn(batch, seq, heads, *head_dim, generator=generator)

    query = draw(sizes.heads, sizes.head_dim)
    key, value, pooled_key, pooled_value = (draw(sizes.kv_heads, sizes.head_dim) for _ in range(4))
    if free:
        query[..., -1], key[..., -1], pooled_key[..., -1] = 0, 0, 0
    merge_logits = 4 * draw(sizes.kv_heads)
    if hard:
        merge_logits = merge_logits.sign() * float("inf")
    return [*(x.to(device, DTYPE) for x in (query, key, value, pooled_key, pooled_value)), merge_logits.to(device)]


def plain_attention(query: Tensor, key: Tensor, value: Tensor) -> Tensor:
    query, key, value = (x.transpose(1, 2) for x in (query, key, value))
    return F.scaled_dot_product_attention(query, key, value, is_causal=True, enable_gqa=True).transpose(1, 2)


def attention_forms(sizes: Sizes) -> dict[str, dict[str, Any]]:
    """Options of windowed_dmc_attention; without a local window it is dmc_attention."""
    forms: dict[str, dict[str, Any]] = {
        "attention": {"local_window": 0},
        "attention, window, merge": {"local_window": sizes.local_window, "operation": "merge"},
        "attention, window, evict": {"local_window": sizes.local_window, "operation": "evict"},
    }
    channels = {"free channel": -1, "no free channel": None}
    return {
        f"{form}, {label}": {**options, "bias_channel": channel}
        for form, options in forms.items()
        for label, channel in channels.items()
    }


def check_attention(sizes: Sizes, device: str) -> list[dict[str, Any]]:
    rows = []
    starts = torch.zeros(1, sizes.check_seq, dtype=torch.bool, device=device)
    starts[:, [sizes.check_seq // 5, sizes.check_seq // 2, sizes.check_seq // 2 + 1]] = True
    kinds = {"soft": (False, None), "hard": (True, None), "soft, packed documents": (False, starts)}
    for name, options in attention_forms(sizes).items():
        for kind, (hard, document_starts) in kinds.items():
            attend = functools.partial(windowed_dmc_attention, **options, document_starts=document_starts)
            rows += compare(
                f"{name}, {kind}",
                attend,
                functools.partial(attend, backend="naive"),
                attention_inputs(1, sizes.check_seq, sizes, device, hard, options["bias_channel"] is not None),
                ATTENTION_INPUTS,
            )
    inputs = attention_inputs(1, sizes.check_seq, sizes, device, False, False)[:3]
    # For comparison: what the plain kernel itself is worth.
    return rows + compare("plain attention", plain_attention, plain_attention, inputs, ATTENTION_INPUTS[:3])


def pooling_inputs(batch: int, seq: int, sizes: Sizes, device: str) -> list[Tensor]:
    generator = torch.Generator().manual_seed(0)
    key, value = (torch.randn(batch, seq, sizes.kv_heads, sizes.head_dim, generator=generator) for _ in range(2))
    merge_logits = 5 * torch.randn(batch, seq, sizes.kv_heads, generator=generator)
    alpha = torch.where(merge_logits.abs() > 5, (merge_logits > 0).float(), torch.sigmoid(merge_logits))
    omega = torch.sigmoid(torch.randn(batch, seq, sizes.kv_heads, generator=generator)) + 2**-7
    return [key.to(device, DTYPE), value.to(device, DTYPE), alpha.to(device), omega.to(device)]


def check_pooling(sizes: Sizes, device: str) -> list[dict[str, Any]]:
    def reference(*inputs: Tensor) -> list[Tensor]:
        # A loop over tokens: on the host.
        return [x.to(device) for x in pool(*(x.cpu() for x in inputs), backend="naive")]

    inputs = pooling_inputs(1, sizes.pooling_seq, sizes, device)
    return compare("pooling", pool, reference, inputs, ("key", "value", "alpha", "omega"))


def time_operations(sizes: Sizes, device: str, rounds: int) -> list[dict[str, Any]]:
    """Forward + backward over plain flash attention, which no operation of ours calls."""
    rows = []
    for seq in sizes.timed_seq:
        inputs = attention_inputs(sizes.timed_batch, seq, sizes, device, False, True)
        leaves = [x.requires_grad_() for x in inputs]
        pooled = [x.requires_grad_() for x in pooling_inputs(sizes.timed_batch, seq, sizes, device)]
        grad = torch.randn_like(inputs[0])
        pooled_grads = [torch.randn_like(pooled[0]) for _ in range(2)]

        functions: dict[str, Callable[[], object]] = {
            "plain flash attention": functools.partial(backpropagate, plain_attention, leaves[:3], [grad]),
            **{
                name: functools.partial(
                    backpropagate, functools.partial(windowed_dmc_attention, **options), leaves, [grad]
                )
                for name, options in attention_forms(sizes).items()
            },
            "pooling": functools.partial(backpropagate, pool, pooled, pooled_grads),
        }
        seconds = common.interleaved_seconds(functions, rounds, synchronize=synchronize(device))
        for name, ratio in common.ratio_to("plain flash attention", seconds).items():
            rows.append({"timed": name, "seq": seq, "ms": common.median_ms(seconds[name]), "over plain": ratio})
    return rows


def backpropagate(function: Callable[..., Any], leaves: Sequence[Tensor], grads: Sequence[Tensor]) -> None:
    torch.autograd.grad(function(*leaves), leaves, grads, allow_unused=True)


def synchronize(device: str) -> Callable[[], None] | None:
    return torch.cuda.synchronize if device == "cuda" else None


class ReferenceAttention(torch.nn.Module):
    """Stands in for the core attention where no flash kernel takes float64; without a local window."""

    def forward(self, query: Tensor, key: Tensor, value: Tensor, *merged: Tensor) -> Tensor:
        """merged: pooled key, pooled value and merge logits; none for the base model."""
        return dmc_attention(query, *merged, backend="naive") if merged else plain_attention(query, key, value)


def check_step(sizes: Sizes, device: str, rounds: int) -> tuple[list[dict[str, Any]], list[dict[str, Any]]]:
    """Loss and gradients of a bf16 step against float64, and its time against the base model's."""
    import models

    from megatron_dmc.model.gpt import dmc_layers

    models.initialize()
    model_sizes = dataclasses.replace(models.SIZES, num_layers=sizes.step_layers, hidden_size=sizes.step_hidden)
    inputs = models.arguments(model_sizes, 1, sizes.step_seq, device)
    rows: list[dict[str, Any]] = []
    fast = {}
    bound: float | None = None
    for name, dmc in {"base": None, **models.DMC_SOURCES}.items():
        model = models.make_model(model_sizes, dmc, DTYPE).train()
        loss, gradient = step_result(model, inputs, models.training_step)
        # The same bf16 weights, in float64.
        reference = models.make_model(model_sizes, dmc, DTYPE).double().train()
        for layer in dmc_layers(reference):
            layer.core_attention = ReferenceAttention()
        expected_loss, expected_gradient = step_result(reference, inputs, models.training_step)
        del reference
        error = relative_error(gradient, expected_gradient)
        rows.append(checked(f"step, {name}", "loss", relative_error(loss, expected_loss), STEP_LOSS_BOUND))
        rows.append(checked(f"step, {name}", "d all weights", error, bound))
        if dmc is None:
            bound = STEP_GRADIENT_FACTOR * error
        fast[name] = model
    functions = {name: functools.partial(models.training_step, model, inputs) for name, model in fast.items()}
    seconds = common.interleaved_seconds(functions, rounds, synchronize=synchronize(device))
    times = [
        {
            "timed": f"step, {name}",
            "seq": sizes.step_seq,
            "ms": common.median_ms(seconds[name]),
            "over plain": ratio,
        }
        for name, ratio in common.ratio_to("base", seconds).items()
    ]
    models.finalize()
    return rows, times


def step_result(model: torch.nn.Module, inputs: dict[str, Any], step: Callable[..., Tensor]) -> tuple[Tensor, Tensor]:
    """The loss and all weights' gradients in one vector."""
    loss = step(model, inputs)
    return loss, torch.cat([p.grad.flatten().double() for p in model.parameters() if p.grad is not None])


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--device", choices=("cuda", "cpu"), default="cuda")
    parser.add_argument("--rounds", type=int, default=11)
    options = parser.parse_args()
    if options.device == "cuda" and not torch.cuda.is_available():
        print("gpu-check: no CUDA device here, nothing was checked")
        return 0
    device = options.device
    if device == "cpu":  # before the first CUDA call: megatron-core builds on a GPU where it sees one
        os.environ["CUDA_VISIBLE_DEVICES"] = ""
    sizes = Sizes() if device == "cuda" else TOY
    step_rows, step_times = check_step(sizes, device, options.rounds)
    rows = check_attention(sizes, device) + check_pooling(sizes, device) + step_rows
    times = time_operations(sizes, device, options.rounds) + step_times
    print("relative errors of bf16 against float64")
    common.print_table(rows)
    print("\nforward + backward, bf16")
    common.print_table(times)
    if device == "cuda":
        print("written:", common.write_results("gpu_check", [*rows, *times], device, **vars(sizes)))
    failed = [row for row in rows if not row["ok"]]
    for row in failed:
        print(f"FAILED: {row['check']}, {row['quantity']}: {row['error']:.2e} > {row['bound']:.2e}", file=sys.stderr)
    return 1 if failed else 0


if __name__ == "__main__":
    sys.exit(main())
