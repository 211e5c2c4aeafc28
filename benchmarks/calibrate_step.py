"""A step of ``calibrate`` against the forward pass that it watches: scores, sums and all.

    python benchmarks/calibrate_step.py

The project's trainer at work on one sample: while it learns (scores and normal equations) and while it measures (scores and
predictions).
"""

import argparse
import functools
import tempfile
from dataclasses import replace
from pathlib import Path

import common
import torch
from adapter_step import prepare, recipe
from models import SIZES

from megatron_dmc.calibration import Calibrator
from megatron_dmc.distributed.world import world
from megatron_dmc.recipe import PhaseConfig
from megatron_dmc.training.trainer import Trainer

PHASE = PhaseConfig(kind="calibrate", steps=10)


def watched(trainer: Trainer, calibrator: Calibrator, step: int) -> None:
    with calibrator.observing(step):
        forward(trainer)


def forward(trainer: Trainer) -> None:
    trainer._forward_step()


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--seq", type=int, nargs="+", default=[512, 2048])
    common.add_timing_options(parser)
    options = parser.parse_args()
    torch.set_num_threads(options.threads)
    rows = []
    for seq in options.seq:
        with tempfile.TemporaryDirectory() as name, world():
            folder = Path(name)
            prepare(folder, seq)
            trainer = Trainer(replace(recipe(folder, seq, "adapter", 0.0), phases=[PHASE]))
            trainer.store.load()
            calibrator = Calibrator(trainer.recipe, PHASE, 4.0, trainer.model)
            steps = {
                "forward pass": functools.partial(forward, trainer),
                "learning": functools.partial(watched, trainer, calibrator, 0),
                "measuring": functools.partial(watched, trainer, calibrator, PHASE.steps - 1),
            }
            seconds = common.interleaved_seconds(steps, options.rounds, options.clock)
        over = common.ratio_to("forward pass", seconds)
        rows += [
            {
                "tokens": seq,
                "step": name,
                "tokens/s": 1000 * seq / common.median_ms(seconds[name]),
                "time over the forward pass": over[name],
            }
            for name in steps
        ]
    common.report(
        "calibrate_step", "a step of calibrate on one sample, float32", rows, clock=options.clock, **vars(SIZES)
    )


if __name__ == "__main__":
    main()
