"""Measures every model of the quickstart on the same held-out text; writes summary.json, prints the table."""

import argparse
import json
import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import torch
from rich.console import Console
from rich.table import Table
from torch import Tensor

HERE = Path(__file__).resolve().parent
sys.path.insert(0, str(HERE.parent))

from measure import measure  # noqa: E402
from small_run import CACHE_TOKENS, write_whole  # noqa: E402

NEW_TOKENS = 64
SUMMARY = Path("summary.json")
# {run: what it is called in the table}
RUNS = {"recipe": "recommended", "adapter": "adapter, distilled", "neuron": "paper's form"}


def measure_all(smoke: bool) -> dict[str, Any]:
    """All numbers of the table. Runs in the quickstart's folder."""
    from megatron_dmc.data import heldout_windows
    from megatron_dmc.data.tokenizer import load_tokenizer

    text = heldout_windows("data/valid", CACHE_TOKENS, load_tokenizer("data/tokenizer"))[0]["tokens"]
    plain = measure_plain_cache("hf-control", text)
    checkpoints = [f"{run}/{name}" for run in RUNS for name in ("cr_2", "cr_3", "final")]
    rows = {}
    for checkpoint in ("base/final", "control/final", *checkpoints):
        print(checkpoint, file=sys.stderr, flush=True)
        rows[checkpoint] = measure(checkpoint, smoke=smoke)
    return {
        "base": rows["base/final"],
        "control": rows["control/final"],
        "dmc": [{"run": name.split("/")[0], **rows[name], "plain_cache_bytes": plain} for name in checkpoints],
        "generation": {name: generate(folder) for name, folder in (("dmc", "hf"), ("control", "hf-control"))},
    }


def measure_plain_cache(folder: str, text: Tensor) -> int:
    """Bytes that transformers' own cache holds for the control after the same text, int64 [seq]."""
    from generate import cache_bytes
    from transformers import AutoModelForCausalLM

    model = AutoModelForCausalLM.from_pretrained(folder).eval()
    with torch.no_grad():
        return cache_bytes(model(text[None], use_cache=True).past_key_values)


def generate(folder: str) -> dict[str, Any]:
    """What generate.py measures, in a process that knows transformers alone."""
    command = [sys.executable, str(HERE / "generate.py"), folder, "--new-tokens", str(NEW_TOKENS), "--json"]
    done = subprocess.run(command, stdout=subprocess.PIPE, env={**os.environ, "HF_HUB_OFFLINE": "1"}, text=True)
    if done.returncode:
        sys.exit(done.returncode)
    return json.loads(done.stdout)


def show(summary: dict[str, Any], console: Console) -> None:
    """The quickstart's table, and the text that the exported model wrote."""
    control = summary["control"]["loss_per_byte"]
    made = {"recipe/final": summary["generation"]["dmc"], "control/final": summary["generation"]["control"]}
    speed = {checkpoint: f"{each['tokens_per_second']:.0f}" for checkpoint, each in made.items()}
    table = Table(title="held-out text")
    for column in (
        "model",
        "target CR",
        "CR",
        "nats/token",
        "perplexity",
        "nats/byte",
        "over control",
        "cache at 2048",
        "tokens/s",
    ):
        table.add_column(column, justify="left" if column == "model" else "right")
    for name in ("base", "control"):
        row = summary[name]
        plain = f"{summary['dmc'][0]['plain_cache_bytes'] / 1024:.0f} KiB"
        table.add_row(name, "", "1.00", *_losses(row, control), plain, speed.get(row["checkpoint"], ""))
    for row in summary["dmc"]:
        table.add_row(
            f"DMC {RUNS[row['run']]}",
            f"{row['target_compression_ratio']:g}",
            f"{row['compression_ratio']:.2f}",
            *_losses(row, control),
            f"{row['cache_bytes'] / 1024:.0f} of {row['plain_cache_bytes'] / 1024:.0f} KiB",
            speed.get(row["checkpoint"], ""),
        )
    console.print(table)
    console.print("\n[bold]hf/ continues a text:[/bold]")
    console.print(summary["generation"]["dmc"]["text"], markup=False, highlight=False)


def _losses(row: dict[str, Any], control: float) -> tuple[str, str, str, str]:
    over = row["loss_per_byte"] - control
    return f"{row['loss']:.4f}", f"{row['perplexity']:.2f}", f"{row['loss_per_byte']:.4f}", f"{over:+.4f}"


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--smoke", action="store_true", help="a few held-out windows only")
    parser.add_argument("--show", action="store_true", help="print the table of a summary that is there")
    parsed = parser.parse_args()
    if parsed.show:
        show(json.loads(SUMMARY.read_text()), Console(width=130))
        return
    from megatron_dmc.checkpoint import CheckpointError
    from megatron_dmc.config import ConfigError
    from megatron_dmc.distributed.world import world

    try:
        with world():
            write_whole(SUMMARY, json.dumps(measure_all(parsed.smoke), indent=1))
    except (ConfigError, CheckpointError, OSError) as error:
        sys.exit(f"quickstart: {error}")


if __name__ == "__main__":
    main()
