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


def print_plan(plan: Plan, smaller: Plan | None, found: Sequence[Plan] | None, console: Console | None = None) -> None:
    """All of it, the verdict last."""
    console = console or Console()
    if not console.is_terminal:
        console.width = 140
    training, cluster = plan.recipe.training, plan.cluster
    learned = "all learn" if plan.learned == plan.weights else f"{plan.learned:,} learn"
    console.print(
        f"{plan.weights:,} parameters, {learned}; {cluster.nodes} x {cluster.gpus_per_node} {cluster.gpu.label}: "
        f"{_sizes(plan)}; {plan.layout.micro_batches} micro-batch(es) of {training.micro_batch_size} per step and replica, "
        f"recompute {training.recompute}",
        highlight=False,
        soft_wrap=True,
    )
    if (vocabulary := _vocabulary(plan.recipe)) is not None:
        console.print(f"vocabulary: {vocabulary}", highlight=False, soft_wrap=True)
    console.print(_memory_table(plan, console))
    console.print(_step_table(plan, console))
    console.print(_phase_table(plan, console))
    console.print(
        f"checkpoints: weights {_bytes(plan.checkpoint_weights)}, full {_bytes(plan.checkpoint_full)}", highlight=False
    )
    if found is not None:
        console.print(_search_table(found, console))
        for place, other in enumerate(found, start=1):
            console.print(f"{place}: {' '.join(layout_overrides(other))}", highlight=False, soft_wrap=True)
    style = "green" if plan.fits else "bold red"
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


def _table(title: str, columns: Sequence[str], console: Console) -> Table:
    frame = box.SIMPLE_HEAD if console.is_terminal else None
    table = Table(title=title, title_justify="left", box=frame, collapse_padding=True, pad_edge=False)
    for i, column in enumerate(columns):
        table.add_column(column, justify="left" if i == 0 else "right", no_wrap=True)
    return table


def _memory_table(plan: Plan, console: Console) -> Table:
    names = [name for name in plan.fullest.parts if name != "teacher" or plan.recipe.teacher is not None]
    table = _table("GB per rank of every pipeline stage", ["stage", "layers", *names, "total", "used"], console)
    for stage in plan.stages:
        table.add_row(
            str(stage.stage),
            "+".join(map(str, stage.layers)),
            *(f"{stage.parts[name] / 1e9:.2f}" for name in names),
            f"{stage.total / 1e9:.2f}",
            f"{stage.total / plan.cluster.gpu.usable:.0%}",
            style="bold" if stage is plan.fullest else None,
        )
    return table


def _step_table(plan: Plan, console: Console) -> Table:
    time, work, traffic = plan.time, plan.work, plan.traffic
    table = _table("one step", ["", "amount", "seconds"], console)
    table.add_row("model FLOPs", f"{work.model:.3e}", f"{time.compute:.2f} (MFU {plan.cluster.mfu:g})")
    table.add_row("recomputed FLOPs", f"{work.recomputed:.3e}", f"{time.recompute:.2f}")
    table.add_row("pipeline bubble", f"{time.bubble / time.total:.1%}", f"{time.bubble:.2f}")
    for name, size in asdict(traffic).items():
        table.add_row(f"sent, {name} parallel", _bytes(size), f"{getattr(time, name):.2f} (not hidden)")
    table.add_row("in all", f"{plan.tokens_per_step:,} tokens", f"{time.total:.2f} (MFU {plan.mfu:.2f})", style="bold")
    return table


def _phase_table(plan: Plan, console: Console) -> Table:
    table = _table("phases", ["phase", "steps", "tokens", "days", "GPU-hours"], console)
    phases = _phases(plan)
    whole = {"phase": "in all"} | {name: sum(phase[name] for phase in phases) for name in phases[0] if name != "phase"}
    for phase in [*phases, whole]:
        table.add_row(
            phase["phase"],
            f"{phase['steps']:,}",
            f"{phase['tokens'] / 1e9:.3f} G",
            f"{phase['days']:.3g}",
            f"{phase['gpu_hours']:,.1f}",
            style="bold" if phase is whole else None,
        )
    return table


def _search_table(found: Sequence[Plan], console: Console) -> Table:
    columns = ["", "layout", "micro-batch", "recompute", "GB", "seconds", "bubble", "MFU", "days"]
    table = _table("layouts that fit, the fastest first" if found else "no layout fits", columns, console)
    for place, plan in enumerate(found, start=1):
        training, time = plan.recipe.training, plan.time
        table.add_row(
            str(place),
            _sizes(plan),
            f"{training.micro_batch_size} x {plan.layout.micro_batches}",
            training.recompute,
            f"{plan.fullest.total / 1e9:.1f}",
            f"{time.total:.2f}",
            f"{time.bubble / time.total:.0%}",
            f"{plan.mfu:.2f}",
            f"{plan.recipe.total_steps * time.total / 86400:.3g}",
        )
    return table


def _phases(plan: Plan) -> list[dict[str, Any]]:
    return [
        {
            "phase": phase.kind,
            "steps": phase.steps,
            "tokens": phase.steps * plan.tokens_per_step,
            "days": phase.steps * plan.time.total / 86400,
            "gpu_hours": phase.steps * plan.time.total * plan.cluster.gpus / 3600,
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


def _gb(size: float) -> str:
    return f"{size / 1e9:.1f} GB"


def _bytes(size: float) -> str:
    if not size:
        return "0"
    for unit, factor in (("TB", 1e12), ("GB", 1e9), ("MB", 1e6)):
        if size >= factor:
            return f"{size / factor:.2f} {unit}"
    return f"{size / 1e3:.1f} kB"
