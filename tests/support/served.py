"""Exports for a serving engine, and what their own generate() says: written once, by the environment that serves them."""

import json
from pathlib import Path
from typing import Any, NamedTuple

import torch

from megatron_dmc.hf import export
from tests.support.exports import VOCABULARY, dmc_model

NEW_TOKENS = 48
LENGTHS = (3, 17, 40, 65, 100, 150, 201, 130)


class Served(NamedTuple):
    """folder: the export's. prompts, outputs: token ids, greedy. ratios: of each prompt with its output."""

    folder: Path
    prompts: list[list[int]]
    outputs: list[list[int]]
    ratios: list[float]


def write_export(
    folder: Path, dmc: dict[str, Any], family: str = "llama", lengths: tuple[int, ...] = LENGTHS, **config: Any
) -> Served:
    """A tiny model of random weights that merges some three tokens out of four.

    Args:
        dmc: its settings.
        lengths: of the prompts.
        config: other values of its configuration.
    """
    model = dmc_model(dmc, family, **{"max_position_embeddings": 1024, **config})
    with torch.no_grad():
        for layer in model.model.layers:
            if model.config.dmc["decision_source"] == "projection":
                layer.self_attn.decision.bias[0::2] += 110
    model.save_pretrained(folder)
    export.write_modeling_code(folder)
    generator = torch.Generator().manual_seed(2)
    prompts = [torch.randint(3, VOCABULARY, (n,), generator=generator).tolist() for n in lengths]
    outputs, ratios = [], []
    for prompt in prompts:
        out = model.generate(
            torch.tensor([prompt]), max_new_tokens=NEW_TOKENS, do_sample=False, return_dict_in_generate=True
        )
        outputs.append(out.sequences[0, len(prompt) :].tolist())
        cache = out.get("cache", out.get("past_key_values"))
        ratios.append(cache.compression_ratio)
    return Served(folder, prompts, outputs, ratios)
