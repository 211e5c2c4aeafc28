"""A small checkpoint: what it says of itself, and a state of one tensor of every dtype."""

from pathlib import Path
from typing import Any

import torch
from megatron.core.dist_checkpointing.mapping import ShardedObject, ShardedTensor

from megatron_dmc.checkpoint import CheckpointInfo
from megatron_dmc.convert.to_checkpoint import placeholder_recipe
from megatron_dmc.model.model_config import ModelConfig

SIZES = ModelConfig(
    num_layers=2,
    hidden_size=16,
    ffn_hidden_size=16,
    num_attention_heads=2,
    num_query_groups=1,
    vocab_size=300,
    max_position_embeddings=64,
)
RECIPE = placeholder_recipe(SIZES, None).to_dict()
RECIPE["phases"][0]["steps"] = 10
MODEL = RECIPE["model"]
INFO = CheckpointInfo(kind="full", recipe=RECIPE, step=3, consumed_samples=24, phase=0, compression_ratio=1.5)


def state(value: float = 0.0, rows: int = 4) -> dict[str, Any]:
    """One tensor of every dtype that training keeps, an object of plain values, and two plain values."""
    tensors = {
        "weight": torch.full((rows, 3), value),
        "half": torch.full((5,), value, dtype=torch.bfloat16),
        "count": torch.full((2,), int(value), dtype=torch.int64),
    }
    model: dict[str, Any] = {
        name: ShardedTensor.from_rank_offsets(name, tensor, replica_id=0) for name, tensor in tensors.items()
    }
    model["object"] = ShardedObject("object", {"gate": value, "ids": [1, 2]}, (1,), (0,), replica_id=0)
    return {"model": model, "step": int(value), "nested": {"lr": value}}


def hidden(root: Path) -> list[str]:
    return sorted(path.name for path in root.iterdir() if path.name.startswith("."))
