"""The recipes of what is compared: small models whose decisions are mixed from the first step on."""

from pathlib import Path
from typing import Any

import torch
from megatron.core.tensor_parallel import ColumnParallelLinear
from omegaconf import OmegaConf

from megatron_dmc.cluster_check.case import CASES, FP8, GPU_CASES, Case
from megatron_dmc.cluster_check.layouts import Layout
from megatron_dmc.data import build_indexed_dataset
from megatron_dmc.data.tokenizer import train_tokenizer
from megatron_dmc.model.attention import DMCSelfAttention
from megatron_dmc.model.gpt import dmc_layers
from megatron_dmc.recipe import Recipe, recipe_from_dict
from megatron_dmc.training.build import why_no_fp8

STEPS = 5
VOCABULARY = 320


def cases_here() -> list[Case]:
    if not torch.cuda.is_available():
        return CASES
    return GPU_CASES if cases_not_here() else [*GPU_CASES, FP8]


def cases_not_here() -> dict[str, str]:
    """What this machine cannot run, by name, and why."""
    why = why_no_fp8()
    return {} if why is None else {FP8.name: why}


def write_data(folder: Path) -> None:
    """A tokenizer and a dataset of made-up text, in documents of one line to many."""
    documents = [
        f"Document {i}. "
        + " ".join(f"The {i * j % 17}th cat sat on mat {j}, log {i % j}." for j in range(1, 2 + 7 * i % 40))
        for i in range(60)
    ]
    tokenizer = train_tokenizer(documents, VOCABULARY, folder / "tokenizer")
    build_indexed_dataset(documents, tokenizer, folder / "text")


def run_folder(folder: Path, case: Case, layout: Layout) -> Path:
    return folder / _slug(case.name) / _slug(layout.name)


def initial_weights(folder: Path, case: Case) -> Path:
    return folder / _slug(case.name) / "start" / "checkpoints" / "initial"


def base_recipe(folder: Path, case: Case) -> Recipe:
    """The model that is retrofitted: random weights."""
    values = _values(folder, case, folder / _slug(case.name) / "base", {})
    values["phases"] = [{"kind": "pretrain", "steps": 1, "lr": 1e-3}]
    values["training"]["train"] = "full"
    values["distillation"] = {}
    return recipe_from_dict(values)


def start_recipe(folder: Path, case: Case) -> Recipe:
    """The retrofit before its first step."""
    values = _values(folder, case, folder / _slug(case.name) / "start", {})
    values["checkpoint"]["load_base"] = str(_base_weights(folder, case))
    return recipe_from_dict(values)


def case_recipe(folder: Path, case: Case, layout: Layout) -> Recipe:
    """The steps to compare; raises ConfigError for a layout that is not supported."""
    values = _values(folder, case, run_folder(folder, case, layout), layout.overrides)
    calibrates = values["phases"][0]["kind"] == "calibrate"
    values["checkpoint"]["load_base"] = str((_base_weights if calibrates else initial_weights)(folder, case))
    if values["distillation"].get("weight") and values["training"].get("train") != "adapter":
        values["distillation"]["teacher"] = str(_base_weights(folder, case))
    return recipe_from_dict(values)


@torch.no_grad()
def scatter_decisions(model: torch.nn.Module) -> None:
    """Projections that merge about a third of the tokens, each head its own share. For the whole model in one process.

    What a family has in its attention beyond Llama's begins as zeros and ones: it is scattered too.
    """
    generator = torch.Generator().manual_seed(0)
    for layer in dmc_layers(model):
        for parameter, about in ((layer.linear_qkv.bias, 0.0), *((x.weight, 1.0) for x in _norms(layer))):
            if parameter is not None:
                parameter.copy_(about + 0.3 * torch.randn(parameter.shape, generator=generator))
        projection = getattr(layer, "decision", None)
        if isinstance(projection, ColumnParallelLinear):
            hidden_size = projection.weight.shape[1]
            for parameter, std in ((projection.weight, 0.15 / hidden_size**0.5), (projection.bias, 0.1)):
                parameter.copy_(torch.randn(parameter.shape, generator=generator) * std)


def _norms(layer: DMCSelfAttention) -> list[torch.nn.Module]:
    return [norm for norm in (layer.q_layernorm, layer.k_layernorm) if norm is not None]


def _base_weights(folder: Path, case: Case) -> Path:
    return folder / _slug(case.name) / "base" / "checkpoints" / "base"


def _slug(name: str) -> str:
    return name.replace(",", "").replace(" ", "-")


def _values(folder: Path, case: Case, run: Path, overrides: dict[str, Any]) -> dict[str, Any]:
    # Flash kernels for GPUs need larger heads.
    on_gpu = torch.cuda.is_available()
    head_dim, sequence_length = (64, 512) if on_gpu else (8, 48)
    values = OmegaConf.create(
        {
            "model": {
                "num_layers": 4,
                "hidden_size": 8 * head_dim,
                "ffn_hidden_size": 12 * head_dim,
                "num_attention_heads": 8,
                "num_query_groups": 2,
                "vocab_size": VOCABULARY,
                "max_position_embeddings": 2 * sequence_length,
                # Hidden states and logits of order 1.
                "init_method_std": 0.5 / head_dim**0.5,
            },
            "dmc": {
                "decision_bias": 1.0,
                "decision_scale": 10.0,
                "temperature": 0.5,
                "loss_coefficient": 10.0,
            },
            "data": {
                "train": [str(folder / "text")],
                "tokenizer": str(folder / "tokenizer"),
                "sequence_length": sequence_length,
                "cache": str(folder / _slug(case.name) / "cache"),
            },
            "phases": [{"kind": "compress", "steps": STEPS, "lr": 1e-3, "start_compression_ratio": 2.0}],
            "training": {"micro_batch_size": 2, "global_batch_size": 8, "bf16": False},
            "distillation": {},
            "parallel": {"use_distributed_optimizer": False},
            "checkpoint": {"directory": str(run / "checkpoints"), "save_every_integer_ratio": False},
            "monitor": {"progress_bar": False},
        }
    )
    for key, value in (case.overrides | overrides).items():
        OmegaConf.update(values, key, value, force_add=True)
    return OmegaConf.to_container(values)  # type: ignore[return-value]
