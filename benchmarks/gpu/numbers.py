"""Attention, pooling, noise and the decode cache against float64 or against the CPU."""

import functools
import itertools
from typing import Any

import torch
from torch import Tensor

from gpu.inputs import (
    ATTENTION_INPUTS,
    attention_forms,
    attention_inputs,
    decode_forms,
    dmc_form,
    plain_attention,
    pooling_inputs,
)
from gpu.measure import OUTPUT_BOUND, checked, compare, relative_error
from gpu.run import Run
from gpu.sizes import DTYPE
from megatron_dmc.ops.attention import windowed_dmc_attention
from megatron_dmc.ops.decode import LayerCache
from megatron_dmc.ops.noise import logistic_noise
from megatron_dmc.ops.pooling import pool
from megatron_dmc.ops.rotary import rotate

# The integers are the same; a GPU's logarithm may differ from a CPU's in the last digits. A wrong bit gives another number.
NOISE_BOUND = 1e-6


def numbers(run: Run) -> None:
    """Attention in every form, then pooling; last what the plain kernel itself is worth."""
    for name, options in attention_forms(run.sizes).items():
        for kind in ("soft", "hard", "soft, packed documents"):
            run.attempt(f"{name}, {kind}", functools.partial(_check_attention, run, name, options, kind))
    run.attempt("pooling", lambda: _check_pooling(run))
    run.attempt("plain attention", lambda: _check_plain_attention(run))


def _check_attention(run: Run, name: str, options: dict[str, Any], kind: str) -> None:
    seq = run.sizes.check_seq
    starts = None
    if kind.endswith("packed documents"):
        starts = torch.zeros(1, seq, dtype=torch.bool, device=run.device)
        starts[:, [seq // 5, seq // 2, seq // 2 + 1]] = True
    attend = functools.partial(dmc_form, **options, document_starts=starts)
    free = options["bias_channel"] is not None
    inputs = attention_inputs(seq, run.sizes, run.device, kind == "hard", free)
    reference = functools.partial(attend, backend="naive")
    for row in compare(f"{name}, {kind}", attend, reference, inputs, ATTENTION_INPUTS):
        run.row("check", **row)


def _check_pooling(run: Run) -> None:
    inputs = pooling_inputs(run.sizes.pooling_seq, run.sizes, run.device)
    for row in compare("pooling", pool, _pooled_on_host, inputs, ("key", "value", "alpha", "omega")):
        run.row("check", **row)


def _pooled_on_host(*inputs: Tensor) -> list[Tensor]:
    """A loop over pairs of tokens: half a million steps at 1000 tokens, each of several launches on a GPU."""
    return [x.to(inputs[0].device) for x in pool(*(x.cpu() for x in inputs), backend="naive")]


def _check_plain_attention(run: Run) -> None:
    inputs = attention_inputs(run.sizes.check_seq, run.sizes, run.device, False, False)[:3]
    for row in compare("plain attention", plain_attention, plain_attention, inputs, ATTENTION_INPUTS[:3]):
        run.row("check", **row)


def noise(run: Run) -> None:
    """The same numbers as on the CPU, so that a run means the same on both."""

    def draw(device: str) -> Tensor:
        samples = torch.arange(3, device=device) + 2**32 - 1
        return logistic_noise(2**40 + 7, samples, 5, range(4), torch.arange(999)).cpu().double()

    got, expected = draw(run.device), draw("cpu")
    error = float(((got - expected).abs() / expected.abs().clamp(min=1)).max())
    run.row("check", **checked("noise", "largest difference from the CPU's", error, NOISE_BOUND))
    run.row("note", noise_numbers=got.numel(), equal_to_the_last_bit=int((got == expected).sum()))


def decode(run: Run) -> None:
    """A prompt in two chunks and then token by token, against attention to all states at once."""
    window = max(run.sizes.local_window // 8, 2)
    inputs = _cache_inputs(run)
    pooled = _pooled_on_host(*(x.double() for x in inputs[1:5]))
    kinds = ((0, "merge"), (window, "merge"), (window, "evict"), (window, "absorb"))
    for form, (local_window, operation) in itertools.product(decode_forms(run.device), kinds):
        name = f"cache, {form}, window {local_window}, {operation}"
        cache = LayerCache(local_window, operation, backend=form)
        run.attempt(name, functools.partial(_check_cache, run, name, inputs, pooled, cache))


@torch.no_grad()
def _check_cache(run: Run, name: str, inputs: list[Tensor], pooled: list[Tensor], cache: LayerCache) -> None:
    query, *tokens = inputs
    seq, stepped = query.shape[1], 8
    cuts = [0, seq // 2, *range(seq - stepped, seq + 1)]
    got = [cache.attend(*(x[:, begin:end] for x in (query, *tokens))) for begin, end in itertools.pairwise(cuts)]
    options = {"local_window": cache.layout.local_window, "operation": cache.layout.operation}
    expected = _whole(query, *tokens, pooled, **options)
    parts = {"prefill": slice(0, seq - stepped), "steps": slice(seq - stepped, seq)}
    for label, places in parts.items():
        error = relative_error(torch.cat(got, 1)[:, places], expected[:, places])
        run.row("check", **checked(name, label, error, OUTPUT_BOUND))


def _cache_inputs(run: Run) -> list[Tensor]:
    """Arguments of LayerCache.attend for two sequences; three in four tokens are merged."""
    sizes, generator = run.sizes, torch.Generator().manual_seed(0)
    shape = (2, sizes.check_seq, sizes.kv_heads)
    query, key, value = (
        torch.randn(*shape[:2], heads, sizes.head_dim, generator=generator).to(run.device, DTYPE)
        for heads in (sizes.heads, sizes.kv_heads, sizes.kv_heads)
    )
    alpha = (torch.rand(shape, generator=generator) < 0.75).to(run.device)
    omega = (torch.rand(shape, generator=generator) + 0.1).to(run.device)
    frequencies = 10000 ** (-torch.arange(0, sizes.head_dim, 2) / sizes.head_dim)
    angles = (torch.arange(shape[1])[None, :, None, None] * frequencies).repeat(1, 1, 1, 2)
    return [query, key, value, alpha, omega, *(x.to(run.device, DTYPE) for x in (angles.cos(), angles.sin()))]


def _whole(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    alpha: Tensor,
    omega: Tensor,
    cos: Tensor,
    sin: Tensor,
    pooled: list[Tensor],
    **options: Any,
) -> Tensor:
    """The training form in float64, by the oracle of attention; pooled keys and values are by the oracle of pooling."""
    query, key, value, omega, cos, sin = (x.double() for x in (query, key, value, omega, cos, sin))
    pooled_key, pooled_value = pooled
    if options["operation"] == "absorb":
        options["omega"] = omega
    query, key, pooled_key = (rotate(x, cos, sin) for x in (query, key, pooled_key))
    merge_logits = torch.where(alpha, float("inf"), float("-inf")).double()
    return windowed_dmc_attention(query, key, value, pooled_key, pooled_value, merge_logits, **options, backend="naive")
