"""Prints a plan: tables on a terminal, the same without frames when piped, or JSON."""

import contextlib
import json
from collections.abc import Sequence
from dataclasses import asdict
from typing import Any

from rich import box
from rich.console import Console
from rich.table import Table

from megatron_dmc.checkpoint.vocabulary import known_tokens
from megatron_dmc.config import ConfigError
from megatron_dmc.plan.estimate import Plan
from megatron_dmc.plan.gpus import RESERVE
from megatron_dmc.recipe import Recipe
from megatron_dmc.recipe.base import has_base, vocabulary_line, vocabulary_of_base


def verdict(plan: Plan, smaller: Plan | None = None) -> str:
    """One line: whether the fullest rank fits, and if not, what fills it and what to try.

    Args:
        smaller: a plan near this one that fits.
    """
    stage, gpu = plan.fullest, plan.cluster.gpu
    used = (
        f"{_gb(stage.total)} on the fullest rank (stage {stage.stage}), {_gb(gpu.usable)} of {gpu.label} after a reserve of "
        f"{RESERVE:.0%}"
    )
    if plan.fits:
        return f"fits: {used}"
    by_size = sorted(stage.parts, key=lambda name: -stage.parts[name])
    most = ", ".join(f"{name} {_gb(stage.parts[name])}" for name in by_size[:2])
    remedy = "try more nodes, training.train=adapter, or --search"
    if smaller is not None:
        remedy = f"try {' '.join(changes(plan, smaller))}, which needs {_gb(smaller.fullest.total)}"
    return f"does not fit: {used}, most of it {most}; {remedy}"


def changes(plan: Plan, other: Plan) -> list[str]:
    """The overrides that lead from one plan's recipe to another's."""
    return [
        f"{section}.{name}={value}"
        for section in ("training", "parallel")
        for name, value in vars(getattr(other.recipe, section)).items()
        if value != getattr(getattr(plan.recipe, section), name)
    ]


def layout_overrides(plan: Plan) -> list[str]:
    """A plan's whole layout as overrides, whatever recipe they are given to."""
    training, parallel = plan.recipe.training, plan.recipe.parallel
    virtual = parallel.virtual_pipeline_model_parallel_size
    values = {
        "parallel.tensor_model_parallel_size": parallel.tensor_model_parallel_size,
        "parallel.sequence_parallel": str(parallel.sequence_parallel).lower(),
        "parallel.pipeline_model_parallel_size": parallel.pipeline_model_parallel_size,
        "parallel.virtual_pipeline_model_parallel_size": "null" if virtual is None else virtual,
        "parallel.context_parallel_size": parallel.context_parallel_size,
        "training.micro_batch_size": training.micro_batch_size,
        "training.recompute": training.recompute,
    }
    return [f"{name}={value}" for name, value in values.items()]


def as_json(plan: Plan, smaller: Plan | None = None) -> dict[str, Any]:
    """Plain values: bytes, seconds, floating-point operations."""
    recipe, cluster = plan.recipe, plan.cluster
    return {
        "fits": plan.fits,
        "verdict": verdict(plan, smaller),
        "cluster": {
            "nodes": cluster.nodes,
            "gpus_per_node": cluster.gpus_per_node,
            "gpu": asdict(cluster.gpu),
            "reserve": RESERVE,
            "mfu": cluster.mfu,
        },
        "layout": {
            **asdict(recipe.parallel),
            "replicas": plan.layout.replicas,
            "micro_batches": plan.layout.micro_batches,
            "micro_batch_size": recipe.training.micro_batch_size,
            "recompute": recipe.training.recompute,
        },
        "weights": plan.weights,
        "learned": plan.learned,
        "stages": [asdict(stage) | {"total": stage.total} for stage in plan.stages],
        "flops_per_step": asdict(plan.work),
        "sent_per_step": asdict(plan.traffic),
        "seconds_per_step": asdict(plan.time) | {"total": plan.time.total},
        "mfu_with_waiting": plan.mfu,
        "checkpoint_bytes": {"weights": plan.checkpoint_weights, "full": plan.checkpoint_full},
        "phases": _phases(plan),
    }


def print_json(plan: Plan, smaller: Plan | None, found: Sequence[Plan] | None) -> None:
    values = as_json(plan, smaller) | {"vocabulary": _vocabulary(plan.recipe)}
    if found is not None:
        values["search"] = [as_json(other) | {"overrides": layout_overrides(other)} for other in found]
    print(json.dumps(values, indent=2))


def headline(plan: Plan) -> str:
    """The answer in one line: fits or not, on how many GPUs, in what time."""
    cluster, stage = plan.cluster, plan.fullest
    nodes = "1 node" if cluster.nodes == 1 else f"{cluster.nodes} nodes of {cluster.gpus_per_node}"
    hours = plan.run_seconds / 3600
    return (
        f"{'fits' if plan.fits else 'does not fit'} on {cluster.gpus} x {cluster.gpu.label} ({nodes}): needs "
        f"{_gb(stage.total)} of {_gb(cluster.gpu.usable)} per GPU; would take {_duration(hours * 3600)}, "
        f"{hours * cluster.gpus:,.1f} GPU-hours"
    )


def print_plan(plan: Plan, smaller: Plan | None, found: Sequence[Plan] | None, console: Console | None = None) -> None:
    """All of it: the answer first, the verdict with its reasons last."""
    console = console or Console()
    if not console.is_terminal:
        console.width = 140
    style = "green" if plan.fits else "bold red"
    learned = "all learn" if plan.learned == plan.weights else f"{plan.learned:,} learn"
    size, count = plan.recipe.training.micro_batch_size, plan.layout.micro_batches
    console.print(headline(plan), style=style, highlight=False, soft_wrap=True)
    vocabulary = _vocabulary(plan.recipe)
    for line in (
        f"model: {plan.weights:,} parameters, {learned}",
        *([] if vocabulary is None else [f"vocabulary: {vocabulary}"]),
        f"layout: {_sizes(plan)}; a replica computes {count} micro-batch{'es' if count > 1 else ''} of {size} "
        f"sample{'s' if size > 1 else ''} per step; recompute {plan.recipe.training.recompute}",
        f"checkpoints on disk: {_bytes(plan.checkpoint_weights)} for weights, {_bytes(plan.checkpoint_full)} for a full one",
    ):
        console.print(line, highlight=False, soft_wrap=True)
    tables = [_memory_table(plan, console), _step_table(plan, console), _phase_table(plan, console)]
    if found is not None:
        tables.append(_search_table(found, console))
    for title, table in tables:
        console.print(f"\n{title}", style="bold", highlight=False, soft_wrap=True)
        console.print(table)
    for place, other in enumerate(found or (), start=1):
        console.print(f"{place}: {' '.join(layout_overrides(other))}", highlight=False, soft_wrap=True)
    console.print()
    console.print(verdict(plan, smaller), style=style, highlight=False, soft_wrap=True)


def _vocabulary(recipe: Recipe) -> str | None:
    """What a run from this base would say of its vocabulary; None where the base is on another machine."""
    base, rows = recipe.checkpoint.load_base, recipe.model.vocab_size
    if base is None or not has_base(base):
        return None
    exported = of_base = vocabulary_of_base(base)
    # As the base, the tokenizer may be on another machine.
    with contextlib.suppress(ConfigError):
        exported = known_tokens(rows, of_base, recipe.data.tokenizer)
    return vocabulary_line(rows, of_base, exported)


def _table(columns: Sequence[str], console: Console) -> Table:
    frame = box.SIMPLE_HEAD if console.is_terminal else None
    table = Table(box=frame, collapse_padding=True, pad_edge=False)
    for i, column in enumerate(columns):
        table.add_column(column, justify="left" if i == 0 else "right", no_wrap=True)
    return table


def _memory_table(plan: Plan, console: Console) -> tuple[str, Table]:
    names = [name for name in plan.fullest.parts if name != "teacher" or plan.recipe.teacher is not None]
    title = (
        "memory of one GPU in GB, by pipeline stage (activations: kept for the backward pass; working: what exists besides "
        "for a moment)"
    )
    usable = f"of {_gb(plan.cluster.gpu.usable)}"
    table = _table(["stage", "layers", *names, "total", usable], console)
    for stage in plan.stages:
        table.add_row(
            str(stage.stage),
            "+".join(map(str, stage.layers)),
            *(f"{stage.parts[name] / 1e9:.2f}" for name in names),
            f"{stage.total / 1e9:.2f}",
            f"{stage.total / plan.cluster.gpu.usable:.0%}",
            style="bold" if stage is plan.fullest else None,
        )
    return title, table


def _step_table(plan: Plan, console: Console) -> tuple[str, Table]:
    """What takes time in a step; kinds of work that this layout has none of are left out."""
    time, work, traffic = plan.time, plan.work, plan.traffic
    title = (
        f"one step of {plan.tokens_per_step:,} tokens (sent: per GPU; its seconds are those that no computation hides)"
    )
    table = _table(["what", "amount", "seconds"], console)
    table.add_row(f"model FLOPs, at {plan.cluster.mfu:.0%} of the peak", f"{work.model:.3e}", f"{time.compute:.2f}")
    if work.recomputed:
        table.add_row("recomputed FLOPs", f"{work.recomputed:.3e}", f"{time.recompute:.2f}")
    if time.bubble:
        table.add_row("pipeline bubble (GPUs wait)", f"{time.bubble / time.total:.1%}", f"{time.bubble:.2f}")
    for name, size in asdict(traffic).items():
        if size:
            table.add_row(f"sent, {name} parallel", _bytes(size), f"{getattr(time, name):.2f}")
    table.add_row("in all", f"MFU {plan.mfu:.2f}", f"{time.total:.2f}", style="bold")
    return title, table


def _phase_table(plan: Plan, console: Console) -> tuple[str, Table]:
    table = _table(["phase", "steps", "tokens", "time", "GPU-hours"], console)
    phases = _phases(plan)
    whole = {"phase": "in all"} | {name: sum(phase[name] for phase in phases) for name in phases[0] if name != "phase"}
    for phase in [*phases, whole]:
        table.add_row(
            phase["phase"],
            f"{phase['steps']:,}",
            _tokens(phase["tokens"]),
            _duration(phase["days"] * 86400),
            f"{phase['gpu_hours']:,.1f}",
            style="bold" if phase is whole else None,
        )
    return "phases of the run", table


def _search_table(found: Sequence[Plan], console: Console) -> tuple[str, Table]:
    columns = ["", "layout", "micro-batches x samples", "recompute", "GB", "s/step", "bubble", "MFU", "time of the run"]
    table = _table(columns, console)
    for place, plan in enumerate(found, start=1):
        training, time = plan.recipe.training, plan.time
        table.add_row(
            str(place),
            _sizes(plan),
            f"{plan.layout.micro_batches} x {training.micro_batch_size}",
            training.recompute,
            f"{plan.fullest.total / 1e9:.1f}",
            f"{time.total:.2f}",
            f"{time.bubble / time.total:.0%}",
            f"{plan.mfu:.2f}",
            _duration(plan.run_seconds),
        )
    title = "layouts that fit, the fastest first (GB: of the fullest GPU; bubble: part of a step in which GPUs wait)"
    return title if found else "no layout fits", table


def _phases(plan: Plan) -> list[dict[str, Any]]:
    return [
        {
            "phase": phase.kind,
            "steps": phase.steps,
            "tokens": phase.steps * plan.tokens_per_step,
            "days": plan.seconds(phase) / 86400,
            "gpu_hours": plan.seconds(phase) * plan.cluster.gpus / 3600,
        }
        for phase in plan.recipe.phases
    ]


def _sizes(plan: Plan) -> str:
    parallel = plan.recipe.parallel
    sizes = [f"TP{parallel.tensor_model_parallel_size}"]
    if parallel.context_parallel_size > 1:
        sizes.append(f"CP{parallel.context_parallel_size}")
    sizes.append(f"PP{parallel.pipeline_model_parallel_size}")
    if parallel.virtual_pipeline_model_parallel_size is not None:
        sizes.append(f"VPP{parallel.virtual_pipeline_model_parallel_size}")
    sizes.append(f"DP{plan.layout.replicas}")
    return " x ".join(sizes) + (", sequence parallel" if parallel.sequence_parallel else "")


def _duration(seconds: float) -> str:
    """In the unit that suits: ``48 s``, ``14 min``, ``7.1 hours``, ``31.1 days``."""
    for unit, length in (("days", 86400), ("hours", 3600)):
        if seconds >= 2 * length:
            return f"{seconds / length:.1f} {unit}"
    if seconds >= 120:
        return f"{seconds / 60:.0f} min"
    return f"{seconds:.0f} s" if seconds >= 1 else "under 1 s"


def _tokens(number: int) -> str:
    return f"{number / 1e9:,.1f} G" if number >= 1e9 else f"{number / 1e6:,.1f} M"


def _gb(size: float) -> str:
    return f"{size / 1e9:.1f} GB"


def _bytes(size: float) -> str:
    if not size:
        return "0"
    for unit, factor in (("TB", 1e12), ("GB", 1e9), ("MB", 1e6)):
        if size >= factor:
            return f"{size / factor:.2f} {unit}"
    return f"{size / 1e3:.1f} kB"
