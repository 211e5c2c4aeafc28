"""One checkpoint's loss on held-out text and on repeated text, the ratio it reaches, and the bytes its cache really holds."""

from pathlib import Path
from typing import Any

from megatron_dmc.checkpoint.folder import kept_ratio
from megatron_dmc.data import heldout_windows
from megatron_dmc.evaluation.cache_size import measure_cache
from megatron_dmc.evaluation.perplexity import evaluate, measure_recall
from megatron_dmc.inference.loading import load_model
from megatron_dmc.report.readers.quickstart import CACHE_TOKENS

# Of the held-out text: every model reads the same first 32 thousand tokens.
WINDOWS = 64
SMOKE_WINDOWS = 8


def measure(checkpoint: str, *, smoke: bool) -> dict[str, Any]:
    """A row of plain values. Runs in the run's folder, inside ``single_process()``.

    Args:
        checkpoint: its path below ``checkpoints/``.
        smoke: reads a few held-out windows only.
    """
    loaded = load_model(Path("checkpoints", checkpoint))
    data = loaded.recipe.data
    windows = heldout_windows(
        "data/valid", data.sequence_length, loaded.tokenizer, reset_at_documents=data.reset_at_documents
    )
    limit = SMOKE_WINDOWS if smoke else WINDOWS
    result = evaluate(loaded, windows, limit=limit)
    row: dict[str, Any] = {
        "checkpoint": checkpoint,
        "loss": result.loss,
        "loss_per_byte": result.loss_per_byte,
        "perplexity": result.perplexity,
        # None where no token of a second copy counts.
        "recall_loss": measure_recall(loaded, windows, limit=limit),
    }
    if result.layer_head_ratio is None:
        return row
    size = measure_cache(loaded, heldout_windows("data/valid", CACHE_TOKENS, loaded.tokenizer)[0]["tokens"])
    dmc = loaded.recipe.dmc
    target = kept_ratio(Path(checkpoint).name) or dmc.target_compression_ratio
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
