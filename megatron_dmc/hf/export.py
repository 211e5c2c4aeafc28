"""The modeling code beside exported weights, so that trust_remote_code needs torch and transformers only."""

import ast
import json
import os
from importlib.resources import files
from pathlib import Path

from megatron_dmc.config import ConfigError

# What is copied, and under which name: transformers knows a flat folder only.
MANIFEST = {
    "megatron_dmc.config": "dmc_config",
    "megatron_dmc.errors": "dmc_errors",
    "megatron_dmc.hf.adapter": "dmc_adapter",
    "megatron_dmc.hf.cache": "dmc_cache",
    "megatron_dmc.hf.configuration_dmc": "configuration_dmc",
    "megatron_dmc.hf.modeling_dmc": "modeling_dmc",
    "megatron_dmc.hf.padding": "dmc_padding",
    "megatron_dmc.ops.attention": "ops_attention",
    "megatron_dmc.ops.attention.api": "ops_attention_api",
    "megatron_dmc.ops.attention.bias_channel": "ops_attention_bias_channel",
    "megatron_dmc.ops.attention.diagonal": "ops_attention_diagonal",
    "megatron_dmc.ops.attention.documents": "ops_attention_documents",
    "megatron_dmc.ops.attention.fading_keys": "ops_attention_fading_keys",
    "megatron_dmc.ops.attention.flash": "ops_attention_flash",
    "megatron_dmc.ops.attention.flash_cpu": "ops_attention_flash_cpu",
    "megatron_dmc.ops.attention.flash_cpu_window": "ops_attention_flash_cpu_window",
    "megatron_dmc.ops.attention.flash_cuda": "ops_attention_flash_cuda",
    "megatron_dmc.ops.attention.keys": "ops_attention_keys",
    "megatron_dmc.ops.attention.naive": "ops_attention_naive",
    "megatron_dmc.ops.attention.parts": "ops_attention_parts",
    "megatron_dmc.ops.attention.slot_attention": "ops_attention_slot_attention",
    "megatron_dmc.ops.attention.types": "ops_attention_types",
    "megatron_dmc.ops.backend": "ops_backend",
    "megatron_dmc.ops.decisions": "ops_decisions",
    "megatron_dmc.ops.decode": "ops_decode",
    "megatron_dmc.ops.decode.layer_cache": "ops_decode_layer_cache",
    "megatron_dmc.ops.decode.open_slot": "ops_decode_open_slot",
    "megatron_dmc.ops.decode.pages": "ops_decode_pages",
    "megatron_dmc.ops.decode.ring": "ops_decode_ring",
    "megatron_dmc.ops.decode.slots": "ops_decode_slots",
    "megatron_dmc.ops.matrix_product": "ops_matrix_product",
    "megatron_dmc.ops.pooling": "ops_pooling",
    "megatron_dmc.ops.pooling.api": "ops_pooling_api",
    "megatron_dmc.ops.pooling.naive": "ops_pooling_naive",
    "megatron_dmc.ops.pooling.scan": "ops_pooling_scan",
    "megatron_dmc.ops.pooling.state": "ops_pooling_state",
    "megatron_dmc.ops.pooling.torch": "ops_pooling_torch",
    "megatron_dmc.ops.rotary": "ops_rotary",
    "megatron_dmc.ops.states": "ops_states",
    "megatron_dmc.ops.tokens": "ops_tokens",
}
MODELING = "modeling_dmc"
AUTO_MAP = {
    "AutoConfig": "configuration_dmc.DMCLlamaConfig",
    "AutoModel": f"{MODELING}.DMCLlamaModel",
    "AutoModelForCausalLM": f"{MODELING}.DMCLlamaForCausalLM",
}


def write_modeling_code(folder: Path) -> None:
    """Copies the modeling code into an exported model's folder and names it in its config.json (auto_map).

    Raises:
        ConfigError: there is no config.json, or it is not this model's.
    """
    path = folder / "config.json"
    try:
        config = json.loads(path.read_text(encoding="utf-8"))
        model_type = config["model_type"]
    except (OSError, ValueError, KeyError, TypeError) as error:
        raise ConfigError(f"{path} is not a model's config.json: {error!r}") from None
    if model_type != "dmc_llama":
        raise ConfigError(f"{path}: model_type must be dmc_llama, got {model_type!r}")
    for name, text in modeling_code().items():
        _write(folder / name, text)
    config["auto_map"] = AUTO_MAP
    _write(path, json.dumps(config, indent=2, sort_keys=True) + "\n")


def modeling_code() -> dict[str, str]:
    """File names in the flat folder and their contents."""
    texts = {flat: flat_imports(_source(module), module) for module, flat in MANIFEST.items()}
    others = sorted(set(texts) - {MODELING})
    texts[MODELING] += _reachable(others)
    return {f"{flat}.py": text for flat, text in texts.items()}


def flat_imports(source: str, module: str) -> str:
    """source with its imports from this package turned into relative ones between the flat folder's files.

    Raises:
        ValueError: it imports something that the manifest does not have.
    """
    lines = source.splitlines(keepends=True)
    imports = [node for node in ast.walk(ast.parse(source)) if isinstance(node, ast.ImportFrom)]
    for node in sorted(imports, key=lambda node: node.lineno, reverse=True):
        origin = node.module or ""
        if origin.split(".")[0] != __package__.split(".")[0]:
            continue
        new = [_flat_import(origin, name, module) for name in node.names]
        lines[node.lineno - 1 : node.end_lineno] = [" " * node.col_offset + line + "\n" for line in new]
    return "".join(lines)


def _flat_import(origin: str, name: ast.alias, module: str) -> str:
    submodule = MANIFEST.get(f"{origin}.{name.name}")
    if submodule is not None:
        return f"from . import {submodule} as {name.asname or name.name}"
    if origin not in MANIFEST:
        raise ValueError(f"{module} imports {name.name} from {origin}, which the export's manifest does not list")
    renamed = f" as {name.asname}" if name.asname else ""
    return f"from .{MANIFEST[origin]} import {name.name}{renamed}"


def _reachable(modules: list[str]) -> str:
    """transformers copies only files whose import it reads in this one; a checker's block costs nothing at run time."""
    imports = "".join(f"    from .{module} import *  # noqa: F403\n" for module in modules)
    return f"\n\nfrom typing import TYPE_CHECKING  # noqa: E402\n\nif TYPE_CHECKING:\n{imports}"


def _source(module: str) -> str:
    package, _, name = module.rpartition(".")
    path = files(package) / f"{name}.py"
    return (path if path.is_file() else files(module) / "__init__.py").read_text(encoding="utf-8")


def _write(path: Path, text: str) -> None:
    """Whole or not at all."""
    temporary = path.with_name(f".{path.name}.tmp")
    with open(temporary, "w", encoding="utf-8") as file:
        file.write(text)
        file.flush()
        os.fsync(file.fileno())
    temporary.replace(path)
