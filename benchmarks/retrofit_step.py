"""A training step with DMC against the base model's step, forward and backward of a GPT model of megatron-core.

    python benchmarks/retrofit_step.py

The optimizer is left out: its work is the same for both, and would only bring the ratio nearer to one.
"""

import argparse
import functools

import common
import torch
from models import DMC_SOURCES, SIZES, arguments, finalize, initialize, make_model, training_step


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--seq", type=int, default=2048)
    parser.add_argument("--batch", type=int, default=1)
    common.add_timing_options(parser)
    options = parser.parse_args()
    torch.set_num_threads(options.threads)
    initialize()
    inputs = arguments(SIZES, options.batch, options.seq, "cpu")
    models = {"base": make_model(SIZES, None)}
    models |= {source: make_model(SIZES, dmc) for source, dmc in DMC_SOURCES.items()}
    steps = {name: functools.partial(training_step, model.train(), inputs) for name, model in models.items()}
    seconds = common.interleaved_seconds(steps, options.rounds, options.clock)
    ratios = common.ratio_to("base", seconds)
    rows = [{"model": name, "ms": common.median_ms(seconds[name]), "over base": ratios[name]} for name in models]
    settings = {"clock": options.clock, "seq": options.seq, "batch": options.batch, **vars(SIZES)}
    title = f"forward + backward at {options.batch} x {options.seq} tokens, float32"
    common.report("retrofit_step", title, rows, **settings)
    finalize()


if __name__ == "__main__":
    main()
