"""A toy run: text, tokenizer, datasets, a recipe of a few steps, and what a run leaves."""

from pathlib import Path
from typing import Any

import torch
import yaml
from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

from megatron_dmc.data import build_indexed_dataset
from megatron_dmc.data.tokenizer import train_tokenizer
from megatron_dmc.recipe import load_recipe
from megatron_dmc.training.trainer import Trainer
from tests.support.processes import ROOT

TEXT = [f"Document {i}. " + "The cat sat on the mat; the dog ran to the log. " * (5 + i % 7) for i in range(60)]
LR = 5e-3
RETROFIT = [
    {"kind": "compress", "steps": 6, "lr": LR},
    {"kind": "solidify", "steps": 3, "lr": LR, "min_lr": LR / 10, "lr_decay_style": "cosine"},
]


# The quickstart's recipes take their model from their base, which is not there in a test.
QUICKSTART_MODEL = yaml.safe_load((ROOT / "examples" / "quickstart" / "base.yaml").read_text("utf-8"))["model"]


def write_text(folder: Path) -> None:
    """A tokenizer in ``tokenizer``, and datasets ``train`` and ``valid``."""
    tokenizer = train_tokenizer(TEXT, 300, folder / "tokenizer")
    for name, documents in (("train", TEXT[:50]), ("valid", TEXT[50:])):
        build_indexed_dataset(documents, tokenizer, str(folder / name))


def recipe_values(data: Path, run: Path, phases: list[dict[str, Any]], **dmc: Any) -> dict[str, Any]:
    """Plain values of a recipe; decisions start near 0, so that they change within a few steps."""
    return {
        "model": {
            "num_layers": 2,
            "hidden_size": 32,
            "ffn_hidden_size": 48,
            "num_attention_heads": 4,
            "num_query_groups": 2,
            "vocab_size": 300,
            "max_position_embeddings": 256,
        },
        "dmc": {"decision_bias": 1.0, "loss_coefficient": 10.0, "decision_scale": 10.0, **dmc},
        "data": {
            "train": [str(data / "train")],
            "valid": [str(data / "valid")],
            "tokenizer": str(data / "tokenizer"),
            "sequence_length": 33,
            "cache": str(data / "cache"),
        },
        "phases": phases,
        "training": {"micro_batch_size": 2, "global_batch_size": 4, "bf16": False},
        "checkpoint": {"directory": str(run / "checkpoints"), "save_interval": 0},
        "monitor": {
            "tensorboard": str(run / "tensorboard"),
            "log_interval": 1,
            "eval_samples": 8,
            "progress_bar": False,
        },
    }


def write_recipe(folder: Path, values: dict[str, Any]) -> Path:
    folder.mkdir(parents=True, exist_ok=True)
    path = folder / "recipe.yaml"
    path.write_text(yaml.safe_dump(values))
    return path


def write_base(folder: Path, steps: int) -> None:
    """Texts, and a base pretrained on them for so many steps, in ``base/checkpoints/final``."""
    write_text(folder)
    values = recipe_values(folder, folder / "base", [{"kind": "pretrain", "steps": steps, "lr": LR}])
    values["model"]["init_method_std"] = 0.2
    train(write_recipe(folder / "base", values))


def train(recipe: Path, *overrides: str) -> Trainer:
    """A trainer whose run is over."""
    trainer = Trainer(load_recipe(recipe, overrides))
    trainer.run()
    return trainer


def weights(trainer: Trainer) -> dict[str, torch.Tensor]:
    return {name: parameter.detach().clone() for name, parameter in trainer.model[0].named_parameters()}


def scalars(run: Path, tag: str) -> dict[int, float]:
    """{step: value} from a run's TensorBoard files."""
    events = EventAccumulator(str(run / "tensorboard"))
    events.Reload()
    return {event.step: event.value for event in events.Scalars(tag)}
