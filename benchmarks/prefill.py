"""Prefill through the compressed cache against plain prefill, and the bytes that the cache holds afterwards.

    python benchmarks/prefill.py

The decisions are given (each head appends one token in ``--ratio`` at random), so that an untrained model compresses
as a retrofitted one; the decision logits are still computed. Plain prefill keeps no cache here: it does a little less than
its due work.
"""

import argparse
from typing import Any

import common
import torch
from models import DMC_SOURCES, SIZES, arguments, finalize, initialize, make_model
from torch import Tensor

from megatron_dmc.config import DMCConfig
from megatron_dmc.inference.context import DMCInferenceContext


class GivenDecisions(DMCInferenceContext):
    """A compressed cache whose decisions are given: ``decision_logits`` [layers, batch, seq, kv_heads]."""

    def __init__(self, dmc: DMCConfig, decision_logits: Tensor) -> None:
        super().__init__(dmc, decision_logits.shape[2])
        self.decision_logits = decision_logits

    def attend(
        self, layer_number: int, query: Tensor, key: Tensor, value: Tensor, _: Tensor, omega: Tensor, **rest: Any
    ) -> Tensor:
        return super().attend(layer_number, query, key, value, self.decision_logits[layer_number - 1], omega, **rest)


def measure(source: str, options: argparse.Namespace) -> dict:
    dmc = DMC_SOURCES[source]
    torch.manual_seed(2)
    uniform = torch.rand(SIZES.num_layers, options.batch, options.seq, SIZES.num_query_groups)
    decision_logits = uniform - 1 / options.ratio
    inputs = arguments(SIZES, options.batch, options.seq, "cpu")
    del inputs["labels"]
    inputs["runtime_gather_output"] = True
    base, compressed = make_model(SIZES, None).eval(), make_model(SIZES, dmc).eval()

    def plain() -> None:
        base(**inputs)

    def through_the_cache() -> DMCInferenceContext:
        context = GivenDecisions(dmc, decision_logits)
        compressed(**inputs, inference_context=context)
        return context

    with torch.no_grad():
        seconds = common.interleaved_seconds(
            {"plain": plain, "compressed": through_the_cache}, options.rounds, options.clock
        )
        context = through_the_cache()
    plain_bytes = 2 * options.batch * options.seq * SIZES.num_layers * SIZES.num_query_groups * SIZES.head_dim * 4
    slots = float(context.slots.sum())
    ratio = context.slots.numel() * options.seq / slots
    return {
        "source": source,
        "plain ms": common.median_ms(seconds["plain"]),
        "time over plain": common.ratio_to("plain", seconds)["compressed"],
        "compression ratio": ratio,
        "cache bytes": context.nbytes,
        "plain bytes": plain_bytes,
        "bytes x ratio": context.nbytes / plain_bytes * ratio,
    }


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--seq", type=int, default=2048)
    parser.add_argument("--batch", type=int, default=1)
    parser.add_argument("--ratio", type=float, default=4.0, help="compression ratio")
    common.add_timing_options(parser)
    options = parser.parse_args()
    torch.set_num_threads(options.threads)
    initialize()
    rows = [measure(source, options) for source in DMC_SOURCES]
    settings = {
        "clock": options.clock,
        "seq": options.seq,
        "batch": options.batch,
        "ratio": options.ratio,
        **vars(SIZES),
    }
    common.report("prefill", f"prefill of {options.batch} x {options.seq} tokens, float32", rows, **settings)
    finalize()


if __name__ == "__main__":
    main()
