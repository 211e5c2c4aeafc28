"""Folders of small made-up runs, as the commands leave them, with names that would break a careless page."""

import json
import shutil
from pathlib import Path
from typing import Any

import torch

from megatron_dmc.data import build_indexed_dataset
from megatron_dmc.data.tokenizer import load_tokenizer, train_tokenizer
from megatron_dmc.training.monitor import Monitor, StepRecord
from tests.support.exports import dmc_model
from tests.support.processes import ROOT
from tests.support.served import save

HOSTILE = "</script><script>document.title='broken'</script>\"'&\u202e\x07<b>"
TEXT = [f'Document {i} </script> "quoted" & <b>bold</b>\nit\'s größer 🙂 {HOSTILE} ' * 4 for i in range(30)]
POSITIONS = 256


def report(ratio: float | None, *, kl: float = 0.0, layers: int = 3, heads: int = 2) -> dict[str, Any]:
    """What ``megatron-dmc evaluate`` reports; ``ratio`` None: of a base."""
    served = [
        {
            "tokens": tokens,
            "cache_bytes": int(2**20 * tokens / 2000 / (ratio or 1)),
            "seconds_to_first_token": tokens / 1000,
            "tokens_per_second": 20.0 - tokens / 1000,
        }
        for tokens in (2000, 8000)
    ]
    found: dict[str, Any] = {
        "loss": 2.0 + kl,
        "continued": [{"tokens": n, "loss": 2.0 + kl} for n in (300, 2000)],
        "copying": [{"tokens": n, "loss": 0.2 + kl} for n in (512, 2048)],
        "serving": served,
    }
    if ratio is not None:
        found["kl"] = kl
        for row in found["continued"]:
            row["kl"] = kl
        for row in served:
            row["compression_ratio"] = ratio
            row["layer_head_compression_ratio"] = [
                [ratio * (1 + layer) / 2 for _ in range(heads)] for layer in range(layers)
            ]
    return found


def comparison() -> dict[str, Any]:
    """Two methods at two ratios, one of them with three seeds; a baseline; one that nobody knows, with a hostile name."""
    rows = []
    for method, label, seeds in (
        ("dmc", "DMC", (1, 2)),
        ("gqa", "fewer KV heads", (None,)),
        (HOSTILE, HOSTILE, (None,)),
    ):
        for ratio in (4.0,) if method == HOSTILE else (2.0, 4.0):
            for seed in seeds:
                kl = 0.01 * ratio * (1 if method == "dmc" else 2) + 0.001 * (seed or 0)
                made = report(ratio * 0.95, kl=kl)
                if method == "gqa":
                    # It keeps every token, so that its report has no ratio.
                    for row in made["serving"]:
                        del row["compression_ratio"], row["layer_head_compression_ratio"]
                rows.append(
                    {
                        "name": f"{method}-cr{ratio:g}" + (f"-seed{seed}" if seed else ""),
                        "method": method,
                        "label": label,
                        "ratio": ratio,
                        "seed": seed,
                        "trained_tokens": 1000,
                        "training_seconds": 12.5 if seed else None,
                        "commands": [f"megatron-dmc retrofit {method}.yaml dmc.seed={seed}"],
                        "report": made,
                        "recall_over_base": 1 - kl,
                        **({"ruler": {"1024": 0.5, "2048": 0.4}} if method == "dmc" else {}),
                    }
                )
    baseline = report(4.0, kl=0.3)
    for name in ("loss", "kl", "copying"):
        del baseline[name]
    rows.append(
        {
            **{"name": "snapkv-cr4", "method": "snapkv", "label": "SnapKV", "ratio": 4.0, "seed": None},
            **{
                "trained_tokens": 0,
                "training_seconds": None,
                "commands": [],
                "report": baseline,
                "recall_over_base": None,
            },
        }
    )
    return {
        "model": {"name": HOSTILE, "num_hidden_layers": 3, "hidden_size": 64},
        "machine": {"cores": 2, "architecture": "x86_64"},
        "text": {"train_tokens": 12345, "heldout_tokens": 678},
        "tokens": 1000,
        "base": report(None),
        "rows": rows,
        "stages": [{"stage": "convert", "command": "megatron-dmc convert-from-hf tiny base", "seconds": 3.5}],
    }


def small_comparison() -> dict[str, Any]:
    """As little as there can be: one model beside its base, and what both recall."""
    found = comparison()
    row = next(row for row in found["rows"] if row["method"] == "gqa")
    found["base"] = row["report"] = {"serving": []}
    return found | {"rows": [row], "stages": []}


def write_small(folder: Path) -> Path:
    folder.mkdir(parents=True)
    (folder / "comparison.json").write_text(json.dumps(small_comparison()))
    return folder


def write_comparison(folder: Path) -> Path:
    """All that a report can show: numbers, curves, an export, held-out text."""
    folder.mkdir(parents=True)
    (folder / "comparison.json").write_text(json.dumps(comparison()))
    write_curves(folder / "tensorboard" / "dmc-cr4")
    write_export(folder / "hf-dmc-cr4-seed1", folder / "data" / "text_valid")
    return folder


def write_real_model(folder: Path) -> Path:
    folder.mkdir(parents=True)
    shutil.copy(ROOT / "examples" / "smollm2" / "results.json", folder / "summary.json")
    return folder


def write_quickstart(folder: Path) -> Path:
    folder.mkdir(parents=True)
    shutil.copy(ROOT / "examples" / "quickstart" / "results.json", folder / "summary.json")
    return folder


def write_curves(folder: Path) -> None:
    """A training of nine steps, and a held-out ratio after six and nine."""
    record: dict[str, Any] = {
        **{"phase": "compress", "lm_loss": 2.0, "learning_rate": 1e-3, "grad_norm": 1.0, "tokens_per_second": 5.0},
        **{"memory_bytes": 1, "consumed_samples": 1, "consumed_tokens": 1},
    }
    with Monitor(folder, 3, 2, heatmap_interval=0) as monitor:
        for step in range(1, 10):
            ratio = 1 + step / 3
            monitor.log_step(
                StepRecord(step=step, compression_ratio=ratio - 0.1, target_compression_ratio=ratio, **record)
            )
            if step % 3 == 0:
                monitor.log_evaluation(step, {"compression_ratio": ratio - 0.2})


def write_export(folder: Path, text: Path | None = None, **dmc: Any) -> None:
    """A tiny model of random weights with its tokenizer; and the held-out text that the prefix ``text`` names."""
    torch.manual_seed(0)
    settings = {"operation": "merge", "local_window": 16, "target_compression_ratio": 2.0, **dmc}
    save(dmc_model(settings, vocab_size=400, max_position_embeddings=POSITIONS), folder)
    train_tokenizer(TEXT, 400, folder)
    if text is not None:
        text.parent.mkdir(parents=True, exist_ok=True)
        build_indexed_dataset(TEXT, load_tokenizer(folder), str(text))
