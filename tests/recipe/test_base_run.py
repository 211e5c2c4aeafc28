"""A retrofit whose recipe has no model section runs, and its checkpoints hold the whole recipe."""

import json
from pathlib import Path

import yaml

from megatron_dmc.__main__ import main
from megatron_dmc.data import build_indexed_dataset
from megatron_dmc.data.tokenizer import train_tokenizer
from megatron_dmc.recipe import load_recipe, recipe_from_dict

MODEL = {
    **{"num_layers": 2, "hidden_size": 32, "ffn_hidden_size": 48, "num_attention_heads": 4, "num_query_groups": 2},
    **{"vocab_size": 300, "max_position_embeddings": 64, "norm_epsilon": 9.999999747378752e-06, "rotary_base": 500.0},
}


def test_a_retrofit_without_a_model_section(tmp_path: Path) -> None:
    text = [f"Document {i}. " + "The cat sat on the mat. " * 9 for i in range(20)]
    build_indexed_dataset(text, train_tokenizer(text, 300, tmp_path / "tokenizer"), str(tmp_path / "text"))
    values = {
        "data": {
            "train": [str(tmp_path / "text")],
            "tokenizer": str(tmp_path / "tokenizer"),
            "sequence_length": 16,
            "cache": str(tmp_path / "cache"),
        },
        "training": {"global_batch_size": 2, "bf16": False},
        "monitor": {"progress_bar": False, "eval_samples": 0},
    }
    base, retrofit = tmp_path / "base", tmp_path / "retrofit"
    phases = [{"kind": "pretrain", "steps": 1}]
    (tmp_path / "base.yaml").write_text(
        yaml.safe_dump({"model": MODEL, "phases": phases, "checkpoint": {"directory": str(base)}, **values})
    )
    phases = [{"kind": "compress", "steps": 1}]
    checkpoint = {"directory": str(retrofit), "load_base": str(base / "final")}
    path = tmp_path / "retrofit.yaml"
    path.write_text(yaml.safe_dump({"phases": phases, "checkpoint": checkpoint, **values}))

    assert main(["retrofit", str(tmp_path / "base.yaml")]) == 0
    # A typed epsilon that differs from the base's by float32's rounding alone fits its weights as well.
    assert main(["retrofit", str(path), "model.norm_epsilon=1e-5", "phases.0.steps=1"]) == 0
    saved = json.loads((retrofit / "final" / "dmc.json").read_text())["recipe"]
    assert saved["model"].items() >= (MODEL | {"norm_epsilon": 1e-5}).items()
    assert recipe_from_dict(saved) == load_recipe(path, ["model.norm_epsilon=1e-5"])
