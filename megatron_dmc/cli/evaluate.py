"""``megatron-dmc evaluate``."""

import argparse
import json
import os
from pathlib import Path
from typing import Any

from megatron_dmc.cli.common import path
from megatron_dmc.config import ConfigError
from megatron_dmc.files import why_nothing_new

HELP = "what a Hugging Face export has kept of its base: loss, recall, cache, speed"


def add_arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("folder", type=path, metavar="HF_FOLDER", help="a plain model, or an export of convert-to-hf")
    parser.add_argument(
        "--text", required=True, type=path, metavar="PREFIX", help="a held-out dataset of megatron-dmc preprocess"
    )
    parser.add_argument("--output", required=True, type=path, metavar="FILE.json", help="the report; must not exist")
    parser.add_argument(
        "--base",
        type=path,
        metavar="FILE.json",
        help="the report of the base that the model was made from, for KL, recall and speed against it; by default the model "
        "is a base",
    )
    parser.add_argument(
        "--amount",
        choices=["smoke", "brief", "default", "full"],
        help="how much is measured of a base, and so of what is compared with it (default, as it is by itself: about ten "
        "minutes for a model of 135 M parameters on two cores)",
    )


def run(options: argparse.Namespace) -> None:
    """Measures a model as transformers serves it: its loss on held-out text, how well it copies, whether it finds what stands
    in texts of up to thousands of tokens, the bytes of its cache, and its speed. First the base, then what was made from it,
    with --base. In the tasks no token is generated: an answer counts where each of its tokens is the likeliest, as in greedy
    generation. The model is served in bfloat16 on a GPU and on a CPU that has instructions for it, else in float32; losses
    on a CPU are always taken in float32."""
    output = Path(options.output)
    if os.path.lexists(output):
        raise ConfigError(f"--output {output} exists; name a new file, or remove it")
    if (problem := why_nothing_new(output)) is not None:
        raise ConfigError(f"--output {output} cannot be written: {problem}; name another file")
    if os.path.realpath(output.parent) == os.path.realpath(options.folder):
        raise ConfigError(
            f"--output {output} lies in {options.folder}, and would count as a part of the model; name a file elsewhere"
        )
    from megatron_dmc.evaluation.exported.evaluate import evaluate_exported
    from megatron_dmc.evaluation.exported.words import told

    report = evaluate_exported(options.folder, options.text, base=options.base, amount=options.amount)
    try:
        _write(output, report)
    finally:
        # Also where the disk is full by now.
        print(told(report), flush=True)
    print(f"{output}: evaluated {options.folder}")


def _write(output: Path, report: dict[str, Any]) -> None:
    """The whole file or none; raises ConfigError where another process has written one since this one began."""
    output.parent.mkdir(parents=True, exist_ok=True)
    partial = output.with_name(f"{output.name}.tmp-{os.getpid()}")
    try:
        partial.write_text(json.dumps(report, indent=1) + "\n", encoding="utf-8")
        if os.path.lexists(output):
            raise ConfigError(f"--output {output} has been written by another process meanwhile; name a new file")
        partial.replace(output)
    finally:
        partial.unlink(missing_ok=True)
