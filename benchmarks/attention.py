"""DMC attention against plain causal attention, forward and backward: time and peak memory.

    python benchmarks/attention.py

Both run torch's own flash kernel on [batch, seq, heads, head_dim] in float32. The dense form builds the s x s bias and
hands it to the same library call; it gives no gradient of the bias, so it does less than the others.
"""

import argparse
import functools
from collections.abc import Callable

import common
import torch
import torch.nn.functional as F
from torch import Tensor

from megatron_dmc.ops.attention import dmc_attention

FORMS = ("plain", "free channel", "no free channel", "dense mask")


def inputs(seq: int, heads: int, head_dim: int) -> list[Tensor]:
    """query, key, value, merge_logits and the output's gradient; the last channel is free."""
    torch.manual_seed(0)
    query, key, value, grad = (torch.randn(1, seq, heads, head_dim) for _ in range(4))
    query[..., -1], key[..., -1] = 0, 0
    merge_logits = 4 * torch.randn(1, seq, heads)
    return [x.requires_grad_() for x in (query, key, value, merge_logits)] + [grad]


def plain(query: Tensor, key: Tensor, value: Tensor, mask: Tensor | None = None) -> Tensor:
    query, key, value = (x.transpose(1, 2) for x in (query, key, value))
    return F.scaled_dot_product_attention(query, key, value, attn_mask=mask, is_causal=mask is None).transpose(1, 2)


def dense_mask(merge_logits: Tensor) -> Tensor:
    """[batch, heads, seq, seq]: log(1 - alpha_{j+1}) below the diagonal, 0 on it, -inf above."""
    seq = merge_logits.shape[1]
    log_keep = F.pad(F.logsigmoid(-merge_logits.detach())[:, 1:], (0, 0, 0, 1)).transpose(1, 2)
    mask = log_keep[:, :, None].expand(-1, -1, seq, -1).tril(-1)
    return mask.masked_fill_(torch.ones(seq, seq, dtype=torch.bool).triu(1), float("-inf"))


def step(form: str, query: Tensor, key: Tensor, value: Tensor, merge_logits: Tensor, grad: Tensor) -> None:
    """Forward and backward."""
    for leaf in (query, key, value, merge_logits):
        leaf.grad = None
    if form == "plain":
        out = plain(query, key, value)
    elif form == "dense mask":
        out = plain(query, key, value, dense_mask(merge_logits))
    else:
        out = dmc_attention(query, key, value, merge_logits, bias_channel=-1 if form == "free channel" else None)
    out.backward(grad)


def peak_bytes(form: str, seq: int, heads: int, head_dim: int) -> int:
    """Inputs, output, gradients and all that is needed on the way, in a process that did nothing else."""
    step(form, *inputs(64, heads, head_dim))
    return common.peak_growth(lambda: step(form, *inputs(seq, heads, head_dim)))


def measure(seq: int, options: argparse.Namespace) -> dict:
    forms = [form for form in FORMS if form != "dense mask" or seq <= options.dense_up_to]
    tensors = inputs(seq, options.heads, options.head_dim)
    steps: dict[str, Callable[[], None]] = {form: functools.partial(step, form, *tensors) for form in forms}
    seconds = common.interleaved_seconds(steps, options.rounds, options.clock)
    times = common.ratio_to("plain", seconds)
    sizes = {
        form: int(common.in_own_process(__file__, ["--peak", form, "--seq", str(seq), *_shape(options)]))
        for form in forms
    }
    row: dict = {"seq": seq, "plain ms": common.median_ms(seconds["plain"])}
    for form in FORMS[1:]:
        row[f"{form}: time"] = times.get(form)
        row[f"{form}: memory"] = sizes[form] / sizes["plain"] if form in sizes else None
    return row


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
    rows = [measure(seq, options) for seq in options.seq]
    title = "forward + backward over plain causal attention, float32"
    common.report("attention", title, rows, clock=options.clock, heads=options.heads, head_dim=options.head_dim)


if __name__ == "__main__":
    main()
