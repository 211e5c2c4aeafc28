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
CACHE_TOKENS = 2048
# Of the held-out text: every model reads the same first 32 thousand tokens.
WINDOWS = 64
NEW_TOKENS = 64
SUMMARY = Path("summary.json")


def measure(smoke: bool) -> dict[str, Any]:
    """All numbers of the table. Runs in the quickstart's folder."""
    from megatron_dmc.evaluation.cache_size import measure_cache
    from megatron_dmc.evaluation.perplexity import evaluate
    from megatron_dmc.inference.loading import load_model
    from megatron_dmc.training.data import heldout_windows

    limit = 8 if smoke else WINDOWS
    rows = [("base", "base/final"), ("control", "control/final")]
    rows += [(source, f"{source}/{name}") for source in ("recipe", "neuron") for name in ("cr_2", "cr_3", "final")]
    summary: dict[str, Any] = {"dmc": []}
    plain = 0
    for name, checkpoint in rows:
        print(f"{checkpoint}", file=sys.stderr, flush=True)
        loaded = load_model(Path("checkpoints", checkpoint))
        windows = heldout_windows("data/valid", loaded.recipe.data.sequence_length, loaded.tokenizer)
        result = evaluate(loaded, windows, limit=limit)
        row = {
            "checkpoint": checkpoint,
            "loss": result.loss,
            "loss_per_byte": result.loss_per_byte,
            "perplexity": result.perplexity,
        }
        if not loaded.merges:
            summary[name] = row
            continue
        text = heldout_windows("data/valid", CACHE_TOKENS, loaded.tokenizer)[0]["tokens"]
        size = measure_cache(loaded, text)
        plain = plain or measure_plain_cache("hf-control", text)
        target = loaded.recipe.dmc.target_compression_ratio if checkpoint.endswith("final") else int(checkpoint[-1])
        assert result.layer_head_ratio is not None
        summary["dmc"].append(
            row
            | {
                "decision_source": loaded.recipe.dmc.decision_source,
                "target_compression_ratio": float(target),
                "compression_ratio": result.compression_ratio,
                "compression_ratio_of_cache": size.compression_ratio,
                "cache_bytes": size.cache_bytes,
                "plain_cache_bytes": plain,
                "layer_head_compression_ratio": result.layer_head_ratio.tolist(),
            }
        )
    summary["generation"] = {name: generate(folder) for name, folder in (("dmc", "hf"), ("control", "hf-control"))}
    return summary


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
            f"DMC {row['decision_source']}",
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
    partial = SUMMARY.with_suffix(".partial")
    from megatron_dmc.config import ConfigError
    from megatron_dmc.training.checkpoint import CheckpointError
    from megatron_dmc.training.distributed import world

    try:
        with world():
            partial.write_text(json.dumps(measure(parsed.smoke), indent=1))
    except (ConfigError, CheckpointError, OSError) as error:
        sys.exit(f"quickstart: {error}")
    partial.replace(SUMMARY)


if __name__ == "__main__":
    main()
