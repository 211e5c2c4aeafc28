"""``megatron-dmc inspect``: what a checkpoint's decisions do to a text."""

import itertools
import json
from pathlib import Path

import torch
from rich.console import Console
from rich.table import Table
from torch import Tensor

from megatron_dmc.config import ConfigError
from megatron_dmc.data import iter_documents, standard_library_documents
from megatron_dmc.data.tokenizer import Tokenizer
from megatron_dmc.evaluation.cache_size import CacheSize, measure_cache
from megatron_dmc.inference.loading import load_model


def run(checkpoint: str, text: str | None, tokens: int, *, as_json: bool = False, base: str | None = None) -> None:
    """Prints the table (or JSON) for the first ``tokens`` tokens of a text."""
    loaded = load_model(checkpoint, base, must_merge=True)
    size = measure_cache(loaded, read_tokens(loaded.tokenizer, text, tokens))
    if as_json:
        print(json.dumps(report(size)))
    else:
        print_table(size, Path(checkpoint).name)


def read_tokens(tokenizer: Tokenizer, text: str | None, count: int) -> Tensor:
    """The first ``count`` tokens of a file or folder, or of Python's own sources; fewer if there are no more."""
    documents = standard_library_documents() if text is None else iter_documents(text)
    ids = itertools.chain.from_iterable(tokenizer.tokenize(document) for document in documents)
    found = list(itertools.islice(ids, count))
    if len(found) < 2:
        raise ConfigError(f"{text} holds fewer than 2 tokens; name a longer text")
    return torch.tensor(found)


def report(size: CacheSize) -> dict[str, object]:
    """The measured numbers as plain values."""
    return {
        "tokens": size.tokens,
        "compression_ratio": size.compression_ratio,
        "layer_head_compression_ratio": size.layer_head_ratio.tolist(),
        "cache_bytes": size.cache_bytes,
        "plain_cache_bytes": size.plain_cache_bytes,
    }


def print_table(size: CacheSize, name: str, console: Console | None = None) -> None:
    """One row per layer, one column per KV head."""
    ratio = size.layer_head_ratio
    table = Table(title=f"{name}: tokens per cache slot over {size.tokens} tokens")
    table.add_column("layer", justify="right")
    for head in range(ratio.shape[1]):
        table.add_column(f"head {head}", justify="right")
    table.add_column("layer's", justify="right", style="bold")
    for layer, heads in enumerate(ratio):
        whole = size.tokens * len(heads) / float(size.slots[layer].sum())
        table.add_row(str(layer), *(f"{value:.2f}" for value in heads.tolist()), f"{whole:.2f}")
    console = console or Console()
    console.print(table)
    saved = 1 - size.cache_bytes / size.plain_cache_bytes
    console.print(
        f"compression ratio {size.compression_ratio:.2f}; cache {_kib(size.cache_bytes)}, "
        f"plain {_kib(size.plain_cache_bytes)}: {saved:.0%} saved"
    )


def _kib(size: int) -> str:
    return f"{size / 1024:,.0f} KiB"
