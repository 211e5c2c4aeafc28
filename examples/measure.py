"""One checkpoint's loss on held-out text, the ratio it reaches there, and the bytes its cache really holds."""

import argparse
import json
import sys
from pathlib import Path
from typing import Any

from small_run import CACHE_TOKENS

# Of the held-out text: every model reads the same first 32 thousand tokens.
WINDOWS = 64
SMOKE_WINDOWS = 8


def measure(checkpoint: str, *, smoke: bool) -> dict[str, Any]:
    """A row of plain values. Runs in the run's folder, inside ``world()``."""
    from megatron_dmc.data import heldout_windows
    from megatron_dmc.evaluation.cache_size import measure_cache
    from megatron_dmc.evaluation.perplexity import evaluate
    from megatron_dmc.inference.loading import load_model

    loaded = load_model(Path("checkpoints", checkpoint))
    data = loaded.recipe.data
    windows = heldout_windows(
        "data/valid", data.sequence_length, loaded.tokenizer, reset_at_documents=data.reset_at_documents
    )
    result = evaluate(loaded, windows, limit=SMOKE_WINDOWS if smoke else WINDOWS)
    row: dict[str, Any] = {
        "checkpoint": checkpoint,
        "loss": result.loss,
        "loss_per_byte": result.loss_per_byte,
        "perplexity": result.perplexity,
    }
    if result.layer_head_ratio is None:
        return row
    size = measure_cache(loaded, heldout_windows("data/valid", CACHE_TOKENS, loaded.tokenizer)[0]["tokens"])
    dmc, name = loaded.recipe.dmc, Path(checkpoint).name
    target = int(name.removeprefix("cr_")) if name.startswith("cr_") else dmc.target_compression_ratio
    return row | {
        "decision_source": dmc.decision_source,
        "operation": dmc.operation,
        "local_window": dmc.local_window,
        "train": loaded.recipe.training.train,
        "distillation_weight": loaded.recipe.distillation.weight,
        "target_compression_ratio": float(target),
        "compression_ratio": result.compression_ratio,
        "compression_ratio_of_cache": size.compression_ratio,
        "cache_bytes": size.cache_bytes,
        "layer_head_compression_ratio": result.layer_head_ratio.tolist(),
    }


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("checkpoint", help="below checkpoints/, such as recipe/final")
    parser.add_argument("--smoke", action="store_true", help="a few held-out windows only")
    parsed = parser.parse_args()
    from megatron_dmc.checkpoint import CheckpointError
    from megatron_dmc.config import ConfigError
    from megatron_dmc.distributed.world import world

    try:
        with world():
            json.dump(measure(parsed.checkpoint, smoke=parsed.smoke), sys.stdout)
    except (ConfigError, CheckpointError, OSError) as error:
        sys.exit(f"measure: {error}")


if __name__ == "__main__":
    main()
