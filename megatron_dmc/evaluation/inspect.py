"""``megatron-dmc inspect``: what a checkpoint's decisions do to a text."""

import itertools
import json
import sys
from pathlib import Path
from typing import Any

import torch
from rich.console import Console
from rich.table import Table
from rich.text import Text
from torch import Tensor

from megatron_dmc.checkpoint.folder import CheckpointError, CheckpointInfo, kept_ratio, read_info
from megatron_dmc.checkpoint.load import check_files
from megatron_dmc.config import ConfigError
from megatron_dmc.data import iter_documents, standard_library_documents
from megatron_dmc.data.tokenizer import Tokenizer
from megatron_dmc.errors import DMCError
from megatron_dmc.evaluation.cache_size import CacheSize, measure_cache
from megatron_dmc.files import CHECKPOINT_MARK, checkpoints_in
from megatron_dmc.inference.loading import load_model
from megatron_dmc.recipe import Recipe, recipe_from_dict
from megatron_dmc.training.messages import REACHED
from megatron_dmc.training.schedule import plan_step

# Tokens that are read where the command names no number, if the model has as many positions.
TOKENS = 2048
_ANY_WIDTH = 100_000


def run(
    checkpoint: str, text: str | None, tokens: int | None, *, as_json: bool = False, base: str | None = None
) -> None:
    """Prints the table (or JSON) for the first ``tokens`` tokens of a text; of a folder of checkpoints, a list of them."""
    if found := checkpoints_below(checkpoint):
        if as_json:
            print(json.dumps(found))
        else:
            print_checkpoints(found, checkpoint)
        if damaged := [row for row in found if "damaged" in row]:
            raise CheckpointError(
                f"{len(damaged)} of {len(found)} checkpoints cannot be read, the first: {damaged[0]['damaged']}"
            )
        return
    loaded = load_model(checkpoint, base, must_merge=True)
    if tokens is None:
        positions = loaded.recipe.model.max_position_embeddings
        tokens = min(TOKENS, positions)
        if tokens < TOKENS:
            print(f"reads {tokens} tokens, which is all of the model's positions", file=sys.stderr)
    size = measure_cache(loaded, read_tokens(loaded.tokenizer, text, tokens))
    folder = Path(checkpoint)
    target = target_at_step(folder.name, loaded.recipe, read_info(folder))
    if as_json:
        saved = {"saved_at_compression_ratio": loaded.compression_ratio, "saved_at_target": target}
        print(json.dumps({**report(size), **saved}))
    else:
        length = loaded.recipe.data.sequence_length
        print_table(size, folder.name, saved_at=loaded.compression_ratio, sample_length=length, target=target)


def checkpoints_below(folder: str | Path) -> list[dict[str, Any]]:
    """What each checkpoint in a folder of checkpoints says it is, in the order of their steps; empty for any other folder.

    Returns:
        Of one that cannot be read, which comes after the others, name and damaged (why). Of another name, kind, step,
        compression_ratio (noise-free, of the last global batch before it was saved; None where nothing merged),
        target_at_step (see :func:`target_at_step`) and target_compression_ratio of the run.
    """
    folder = Path(folder)
    if (folder / CHECKPOINT_MARK).exists():
        return []
    whole, damaged = [], []
    # A checkpoint that has lost its description is one by its tensors' names.
    lost = {path.parent for path in folder.glob("*/.metadata") if not path.parent.name.startswith(".")}
    for place in sorted({*checkpoints_in(folder), *lost}) if checkpoints_in(folder) else []:
        try:
            whole.append(_row(place))
        except DMCError as error:
            damaged.append({"name": place.name, "damaged": str(error)})
    return sorted(whole, key=lambda row: (row["step"], row["name"])) + damaged


def _row(folder: Path) -> dict[str, Any]:
    info = check_files(folder).info
    try:
        recipe = recipe_from_dict(info.recipe)
    except ConfigError as error:
        raise CheckpointError(f"{folder / CHECKPOINT_MARK} is damaged, its recipe cannot be read: {error}") from None
    return {
        "name": folder.name,
        "kind": info.kind,
        "step": info.step,
        "compression_ratio": info.compression_ratio,
        "target_at_step": target_at_step(folder.name, recipe, info),
        "target_compression_ratio": recipe.dmc.target_compression_ratio if recipe.merges else None,
    }


def target_at_step(name: str, recipe: Recipe, info: CheckpointInfo) -> float | None:
    """The ratio that the schedule asked for when a checkpoint was saved; None where nothing merged, or no run saved it.

    A checkpoint ``cr_N`` is due when the target passes N; the step's own target may lie beside N by a fraction.
    """
    if not recipe.merges or not 0 < info.step <= recipe.total_steps:
        return None
    if (kept := kept_ratio(name)) is not None:
        return float(kept)
    return plan_step(recipe.phases, recipe.dmc, info.step - 1).target_compression_ratio


def print_checkpoints(rows: list[dict[str, Any]], folder: str | Path, console: Console | None = None) -> None:
    """One row per checkpoint, see checkpoints_below."""
    table = Table(title=Text(str(folder)))
    table.add_column("checkpoint")
    table.add_column("holds")
    for column in ("step", "target at that step", "CR of the last batch", "run's target"):
        table.add_column(column, justify="right")
    readable = [row for row in rows if "damaged" not in row]
    missed = [_is_below(row["compression_ratio"], row["target_at_step"]) for row in readable]
    for row, below in zip(readable, missed, strict=True):
        ratio = row["compression_ratio"]
        table.add_row(
            Text(row["name"]),
            row["kind"],
            str(row["step"]),
            _target(row["target_at_step"]),
            "-" if ratio is None else f"{'! ' if below else ''}{ratio:.2f}",
            _target(row["target_compression_ratio"]),
        )
    damaged = [row for row in rows if "damaged" in row]
    for row in damaged:
        table.add_row(Text(row["name"]), "damaged", *"----")
    console = console or _console()
    console.print(table)
    for row in damaged:
        console.print(f"{row['name']}: {row['damaged']}", highlight=False, markup=False, soft_wrap=True)
    if any(missed):
        kept = any(row["name"].startswith("cr_") for row in rows)
        why = (
            ": cr_N is saved when the schedule's target passes N, not when the model's ratio reaches it" if kept else ""
        )
        console.print(f"! saved below its target{why}", highlight=False)


def _is_below(ratio: float | None, target: float | None) -> bool:
    return ratio is not None and target is not None and ratio < REACHED * target


def _target(value: float | None) -> str:
    return "-" if value is None else f"{round(value, 2):g}"


def read_tokens(tokenizer: Tokenizer, text: str | None, count: int) -> Tensor:
    """The first ``count`` tokens of a file or folder, or of Python's own sources; fewer if there are no more."""
    documents = standard_library_documents() if text is None else iter_documents(text, "--text")
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
        "layers_that_merge_everything": size.layers_that_merge_everything,
        "cache_bytes": size.cache_bytes,
        "plain_cache_bytes": size.plain_cache_bytes,
    }


def print_table(
    size: CacheSize,
    name: str,
    console: Console | None = None,
    *,
    saved_at: float | None = None,
    sample_length: int | None = None,
    target: float | None = None,
) -> None:
    """One row per layer, one column per KV head.

    Args:
        saved_at: the ratio of the last batch before the checkpoint.
        sample_length: tokens of that batch's samples; the shorter they are, the larger a part is the window.
        target: what the schedule asked for then.
    """
    ratio, everything = size.layer_head_ratio, size.layers_that_merge_everything
    table = Table(title=Text(f"{name}: tokens per cache slot over {size.tokens} tokens"))
    table.add_column("layer", justify="right")
    for head in range(ratio.shape[1]):
        table.add_column(f"head {head}", justify="right")
    table.add_column("layer's", justify="right", style="bold")
    for layer, (heads, whole) in enumerate(zip(ratio.tolist(), size.layer_ratio.tolist(), strict=True)):
        mark = "!" if layer in everything else ""
        table.add_row(f"{mark}{layer}", *(f"{value:.2f}" for value in heads), f"{whole:.2f}")
    console = console or _console()
    console.print(table)
    samples = "" if sample_length is None else f" on samples of {sample_length} tokens"
    then = "" if target is None else f", target then {_target(target)}"
    trained = "" if saved_at is None else f" ({saved_at:.2f} in training{samples}{then})"
    console.print(
        f"compression ratio {size.compression_ratio:.2f}{trained}; cache {_kib(size.cache_bytes)}, "
        f"plain {_kib(size.plain_cache_bytes)}: {_saving(size)}"
    )
    if saved_at is not None and target is not None and _is_below(saved_at, target):
        console.print(
            f"! saved below its target: the schedule asked for {_target(target)} at that step, the ratio was {saved_at:.2f}",
            highlight=False,
        )
    if everything:
        window = f" beyond the last {size.window}" if size.window else ""
        console.print(
            f"! {_layers(everything)} {'merges' if len(everything) == 1 else 'merge'} nearly every token{window}: little of "
            "the text is left there, and the other layers keep more than the ratio says"
        )


def _console() -> Console:
    """Where no terminal sets a width, a line may be as long as it is: a program reads it."""
    console = Console()
    if not console.is_terminal:
        console.width = _ANY_WIDTH
    return console


def _saving(size: CacheSize) -> str:
    """The cache's bytes against a plain cache's. It can be the larger one: it holds whole pages and its open slots' sums."""
    share = round(100 * (size.cache_bytes / size.plain_cache_bytes - 1))
    if share > 0:
        return f"{share}% more than without DMC (too little merges to pay for the pages)"
    return f"{-share}% saved"


def _layers(numbers: list[int]) -> str:
    return f"layer{'' if len(numbers) == 1 else 's'} {', '.join(map(str, numbers))}"


def _kib(size: int) -> str:
    return f"{size / 1024:,.0f} KiB"
