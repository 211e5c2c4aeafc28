"""docs/results.md, written from a run's summary."""

from collections.abc import Sequence
from typing import Any

from megatron_dmc.experiments.real_model.summary import (
    LOSS_COLUMNS,
    SERVING_COLUMNS,
    loss_rows,
    recall_columns,
    recall_rows,
    serving_rows,
)

_PAGE = """# A real model

`make real-model` wrote this page from [examples/smollm2/results.json](../examples/smollm2/results.json); do not edit it.

The model is {name}: {num_hidden_layers} layers, hidden size {hidden_size}, {num_attention_heads} query heads on
{num_key_value_heads} KV heads, {vocab_size:,} tokens. The text is the sources and the documentation of Python's standard
library: {train_tokens:,} tokens to train on, {heldout_tokens:,} held out. Each retrofit was calibrated on
{calibrated_tokens:,} tokens, and the trained ones then trained on {trained_tokens:,}, in samples of {sequence_length}.

Machine: {gpu}{cores} cores ({architecture}), {threads} threads, torch {torch}, transformers {transformers},
Python {python}. All stages took {minutes:.0f} minutes. One run, one seed. Recall, cache and speed are those of a model
served in {serving_dtype}.

![Costs, recall and ratios](figures/results.png)

## Held-out text

{windows} texts of {window_tokens} tokens, nats per token. *CR* is the compression ratio, tokens per slot, of the first text of
"Cache and speed". The last {local_window} tokens of every text take a slot each, so that shorter texts are compressed less.
*KL* is KL(base || model). *copying* is the loss on the second half of {copies} texts whose halves are
equal, of {copy_tokens} tokens. *recall over base* is the mean of the next table's accuracies over the base's.

{losses}

## Recall

Right answers of all samples. An answer is right where each of its tokens is the likeliest one, as in greedy generation. The
prompt is taken into the cache first, then the answer. A star: the base is right in fewer than half of its samples, so the task
does not count, and is not asked of the other models ("skipped").

{recall}

## Cache and speed

One text each, then {new_tokens} tokens one by one, batch size 1. *plain* is the base with transformers' own cache, measured
in the same process right after.

{serving}

## The commands

In the run's folder:

{stages}

{comparison}
"""


def page(summary: dict[str, Any], comparison: str) -> str:
    """The whole page: tables, what each number means, the machine, and the commands.

    Args:
        comparison: the section of ``megatron-dmc compare``.
    """
    stages = [
        (stage["stage"], f"{stage['seconds']:.0f}", f"`{stage['command']}`" if stage["command"] else "")
        for stage in summary["stages"]
    ]
    return _PAGE.format(
        **summary["model"],
        **summary["text"],
        **{name: value for name, value in summary["machine"].items() if name != "gpu"},
        **{name: summary["base"]["amount"][name] for name in ("windows", "window_tokens", "copies", "new_tokens")},
        gpu="".join(f"{name}, " for name in [summary["machine"].get("gpu")] if name),
        copy_tokens=" and of ".join(map(str, summary["base"]["amount"]["copy_tokens"])),
        serving_dtype=summary["base"]["serving_dtype"],
        local_window=summary["models"][0]["local_window"],
        minutes=sum(stage["seconds"] for stage in summary["stages"]) / 60,
        losses=markdown_table(LOSS_COLUMNS, loss_rows(summary)),
        recall=markdown_table(recall_columns(summary), recall_rows(summary)),
        serving=markdown_table(SERVING_COLUMNS, serving_rows(summary)),
        stages=markdown_table(("stage", "seconds", "command"), stages),
        comparison=comparison,
    )


def markdown_table(columns: Sequence[str], rows: Sequence[Sequence[str]]) -> str:
    """Of the texts of its cells."""
    lines = [columns, ["---"] * len(columns), *rows]
    return "\n".join("| " + " | ".join(cells) + " |" for cells in lines)
