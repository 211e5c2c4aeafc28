"""Measures every model of the quickstart on the same held-out text and writes summary.json."""

import json
import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from megatron_dmc.data import heldout_windows
from megatron_dmc.data.tokenizer import load_tokenizer
from megatron_dmc.experiments.measure import measure
from megatron_dmc.experiments.quickstart import generate
from megatron_dmc.experiments.small_run import CommandFailed
from megatron_dmc.files import write_whole
from megatron_dmc.report.readers.quickstart import CACHE_TOKENS, RUNS

NEW_TOKENS = 64
SUMMARY = Path("summary.json")


def write_summary(smoke: bool) -> None:
    """Writes ``summary.json``, as :func:`measure_all`."""
    write_whole(SUMMARY, json.dumps(measure_all(smoke), indent=1))


def measure_all(smoke: bool) -> dict[str, Any]:
    """All numbers of the table. Runs in the quickstart's folder, inside ``single_process()``."""
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
        "generation": {name: generate_alone(folder) for name, folder in (("dmc", "hf"), ("control", "hf-control"))},
    }


def measure_plain_cache(folder: str, text: Tensor) -> int:
    """Bytes that transformers' own cache holds for the control after the same text, int64 [seq]."""
    from transformers import AutoModelForCausalLM

    model = AutoModelForCausalLM.from_pretrained(folder).eval()
    with torch.no_grad():
        return generate.cache_bytes(model(text[None], use_cache=True).past_key_values)


def generate_alone(folder: str) -> dict[str, Any]:
    """What generate.py measures, in a process that has only transformers and the exported folder."""
    # -P: that process does not see the modules beside the script.
    command = [sys.executable, "-P", generate.__file__, folder, str(NEW_TOKENS)]
    done = subprocess.run(command, stdout=subprocess.PIPE, env={**os.environ, "HF_HUB_OFFLINE": "1"}, text=True)
    if done.returncode:
        raise CommandFailed(f"generation from {folder} did not finish; see above")
    return json.loads(done.stdout)
