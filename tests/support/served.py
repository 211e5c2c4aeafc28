"""Exports for a serving engine, and what their own generate() says, by the transformers of the engine's environment."""

import json
from pathlib import Path
from typing import Any, NamedTuple

import torch

from megatron_dmc.hf import export
from tests.support.exports import VOCABULARY, dmc_model

NEW_TOKENS = 32
# Shorter than the local windows and longer; within one page, at its end, over many.
LENGTHS = (3, 16, 40, 65, 151)


class Served(NamedTuple):
    """folder: the export's. prompts, outputs: token ids, greedy. ratios: of each prompt with its output."""

    folder: Path
    prompts: list[list[int]]
    outputs: list[list[int]]
    ratios: list[float]


def random_prompts(lengths: tuple[int, ...], seed: int = 2) -> list[list[int]]:
    generator = torch.Generator().manual_seed(seed)
    return [torch.randint(3, VOCABULARY, (n,), generator=generator).tolist() for n in lengths]


def served_model(dmc: dict[str, Any], family: str = "llama", merge_bias: float = 110.0, **config: Any) -> Any:
    """A tiny model of random weights. ``merge_bias`` lifts a projection's decision logits: some three tokens of four merge."""
    model = dmc_model(dmc, family, **{"max_position_embeddings": 1024, **config})
    if model.config.dmc["decision_source"] == "projection":
        for layer in model.model.layers:
            layer.self_attn.decision.bias.data[0::2] += merge_bias
    return model


def save(model: Any, folder: Path) -> Path:
    """As ``megatron-dmc convert-to-hf`` leaves a folder, without a tokenizer."""
    model.save_pretrained(folder)
    export.write_modeling_code(folder)
    return folder


def served(model: Any, folder: Path, lengths: tuple[int, ...] = LENGTHS) -> Served:
    """Saves a model and asks it for the outputs that an engine must give."""
    save(model, folder)
    outputs, ratios = [], []
    prompts = random_prompts(lengths)
    for prompt in prompts:
        out = model.generate(
            torch.tensor([prompt]), max_new_tokens=NEW_TOKENS, do_sample=False, return_dict_in_generate=True
        )
        outputs.append(out.sequences[0, len(prompt) :].tolist())
        ratios.append(next(out[name] for name in ("cache", "past_key_values") if name in out).compression_ratio)
    return Served(folder, prompts, outputs, ratios)


def write(case: Served, path: Path) -> None:
    """For another process."""
    path.write_text(json.dumps({**case._asdict(), "folder": str(case.folder)}))


def read(path: Path) -> Served:
    values = json.loads(path.read_text())
    return Served(**{**values, "folder": Path(values["folder"])})
