"""DMC attention against plain causal attention, forward and backward: time and peak memory.

    python benchmarks/attention.py

Both run torch's own flash kernel on [batch, seq, heads, head_dim] in float32. With a local window, raw keys nearby and slots
farther off are two calls of it. The dense form builds the s x s bias and hands it to the same library call; it gives no
gradient of the bias, so it does less than the others.
"""

import argparse
import functools
from collections.abc import Callable
from typing import Any

import common
import torch
import torch.nn.functional as F
from torch import Tensor

from megatron_dmc.ops.attention import windowed_dmc_attention

LOCAL_WINDOW = 256
# Options of windowed_dmc_attention, which is dmc_attention at local_window 0.
DMC_FORMS: dict[str, dict[str, Any]] = {
    "free channel": {"local_window": 0, "bias_channel": -1},
    "no free channel": {"local_window": 0},
    "window, merge, free channel": {"local_window": LOCAL_WINDOW, "operation": "merge", "bias_channel": -1},
    "window, merge, no free channel": {"local_window": LOCAL_WINDOW, "operation": "merge"},
    "window, evict, free channel": {"local_window": LOCAL_WINDOW, "operation": "evict", "bias_channel": -1},
    "window, evict, no free channel": {"local_window": LOCAL_WINDOW, "operation": "evict"},
    "window, absorb, free channel": {"local_window": LOCAL_WINDOW, "operation": "absorb", "bias_channel": -1},
    "window, absorb, no free channel": {"local_window": LOCAL_WINDOW, "operation": "absorb"},
}
FORMS = ("plain", *DMC_FORMS, "dense mask")


def inputs(seq: int, heads: int, head_dim: int, own_slots: bool = True) -> list[Tensor]:
    """query, key, value, pooled_key, pooled_value, merge_logits, omega and the output's gradient; the last channel is free.

    Without ``own_slots`` the key and value are the slots: only merging with a window reads both.
    """
    torch.manual_seed(0)
    query, key, value, grad = (torch.randn(1, seq, heads, head_dim) for _ in range(4))
    merge_logits = 4 * torch.randn(1, seq, heads)
    slots = [torch.randn(1, seq, heads, head_dim) for _ in range(2)] if own_slots else [key, value]
    omega = torch.randn(1, seq, heads).exp()
    for x in (query, key, slots[0]):
        x[..., -1] = 0
    return [x.requires_grad_() for x in (query, key, value, *slots, merge_logits, omega)] + [grad]


def plain(query: Tensor, key: Tensor, value: Tensor, mask: Tensor | None = None) -> Tensor:
    query, key, value = (x.transpose(1, 2) for x in (query, key, value))
    return F.scaled_dot_product_attention(query, key, value, attn_mask=mask, is_causal=mask is None).transpose(1, 2)


def dense_mask(merge_logits: Tensor) -> Tensor:
    """[batch, heads, seq, seq]: log(1 - alpha_{j+1}) below the diagonal, 0 on it, -inf above."""
    seq = merge_logits.shape[1]
    log_keep = F.pad(F.logsigmoid(-merge_logits.detach())[:, 1:], (0, 0, 0, 1)).transpose(1, 2)
    mask = log_keep[:, :, None].expand(-1, -1, seq, -1).tril(-1)
    return mask.masked_fill_(torch.ones(seq, seq, dtype=torch.bool).triu(1), float("-inf"))


def attend(form: str, query: Tensor, key: Tensor, value: Tensor, *decided: Tensor) -> Tensor:
    """``decided``: pooled_key, pooled_value, merge_logits, omega."""
    pooled_key, pooled_value, merge_logits, omega = decided
    if form == "plain":
        return plain(query, key, value)
    if form == "dense mask":
        return plain(query, pooled_key, pooled_value, dense_mask(merge_logits))
    options = DMC_FORMS[form]
    weights = {"omega": omega} if options.get("operation") == "absorb" else {}
    return windowed_dmc_attention(query, key, value, pooled_key, pooled_value, merge_logits, **options, **weights)


def step(form: str, *tensors: Tensor) -> None:
    """Forward and backward."""
    *leaves, grad = tensors
    for leaf in leaves:
        leaf.grad = None
    attend(form, *leaves).backward(grad)


def peak_bytes(form: str, seq: int, heads: int, head_dim: int) -> int:
    """Inputs, output, gradients and all that is needed on the way, in a process that did nothing else."""
    own_slots = form.startswith("window, merge")
    step(form, *inputs(64, heads, head_dim, own_slots))
    return common.peak_growth(lambda: step(form, *inputs(seq, heads, head_dim, own_slots)))


def measure(seq: int, options: argparse.Namespace) -> list[dict[str, Any]]:
    """A row per form."""
    forms = [form for form in FORMS if form != "dense mask" or seq <= options.dense_up_to]
    tensors = inputs(seq, options.heads, options.head_dim)
    steps: dict[str, Callable[[], None]] = {form: functools.partial(step, form, *tensors) for form in forms}
    seconds = common.interleaved_seconds(steps, options.rounds, options.clock)
    times = common.ratio_to("plain", seconds)
    over_evict = {
        form: common.ratio_to(form.replace("absorb", "evict"), seconds)[form] for form in forms if "absorb" in form
    }
    sizes = {
        form: int(common.in_own_process(__file__, ["--peak", form, "--seq", str(seq), *_shape(options)]))
        for form in forms
    }
    return [
        {
            "seq": seq,
            "form": form,
            "ms": common.median_ms(seconds[form]),
            "time over plain": times[form],
            "time over evict": over_evict.get(form),
            "peak MiB": sizes[form] / 2**20,
            "memory over plain": sizes[form] / sizes["plain"],
        }
        for form in forms
    ]


def _shape(options: argparse.Namespace) -> list[str]:
    return ["--heads", str(options.heads), "--head-dim", str(options.head_dim), "--threads", str(options.threads)]


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    common.add_operation_options(parser)
    common.add_timing_options(parser)
    parser.add_argument("--dense-up-to", type=int, default=4096, help="longest sequence for the dense form")
    parser.add_argument("--peak", choices=FORMS, help=argparse.SUPPRESS)
    options = parser.parse_args()
    torch.set_num_threads(options.threads)
    if options.peak:
        print(peak_bytes(options.peak, options.seq[0], options.heads, options.head_dim))
        return
    rows = [row for seq in options.seq for row in measure(seq, options)]
    title = "forward + backward over plain causal attention, float32"
    settings = {"heads": options.heads, "head_dim": options.head_dim, "local_window": LOCAL_WINDOW}
    common.report("attention", title, rows, clock=options.clock, rounds=options.rounds, **settings)


if __name__ == "__main__":
    main()
