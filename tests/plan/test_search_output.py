"""Layouts that a search finds can be copied, and a search says how far it is."""

import io
import json
from collections.abc import Callable
from typing import Any

from rich.console import Console

from megatron_dmc.plan.cluster import Cluster
from megatron_dmc.plan.gpus import GPUS
from megatron_dmc.plan.progress import progress
from megatron_dmc.plan.search import search
from tests.support import planning
from tests.support.planning import LLAMA2_70B

Elsewhere = Callable[..., Any]


def test_a_layout_is_printed_as_overrides_that_make_it(elsewhere: Elsewhere) -> None:
    command = ("plan", LLAMA2_70B, "--nodes", 1, "--gpus-per-node", 2, *planning.TINY)
    # Over whatever the recipe says.
    command += ("parallel.context_parallel_size=2", "training.recompute=full")
    status, out, err = elsewhere(planning.command, *command, "--search")
    assert (status, err) == (0, "")
    lines = [line for line in out.splitlines() if line[:3] in {f"{place}: " for place in range(1, 6)}]
    status, found, _ = elsewhere(planning.command, *command, "--search", "--json")
    layouts = json.loads(found)["search"]
    assert len(lines) == len(layouts) > 1
    for line, layout in zip(lines, layouts, strict=True):
        overrides = line[3:].split()
        assert overrides == layout["overrides"]
        status, out, err = elsewhere(planning.command, *command, *overrides, "--json")
        assert (status, err) == (0, "") and json.loads(out)["layout"] == layout["layout"]


def states(overrides: list[str]) -> list[str]:
    said: list[str] = []
    search(planning.tiny(*overrides), Cluster(1, 2, GPUS["h100"], 0.4), wanted=1, show=said.append)
    return said


def test_a_search_says_how_far_it_is(elsewhere: Elsewhere) -> None:
    said = elsewhere(states, ["training.global_batch_size=4"])
    estimates = [state for state in said if state.startswith("estimating layout ")]
    assert estimates == [f"estimating layout {i} of {len(estimates)}" for i in range(1, len(estimates) + 1)]
    assert said[len(estimates)] == "planning the fastest: 0 of 1 found"


def test_progress_is_for_terminals() -> None:
    for terminal in (True, False):
        console = Console(file=io.StringIO(), force_terminal=terminal, width=60)
        with progress(console) as show:
            show("estimating layout 7 of 9")
        written = console.file.getvalue()  # type: ignore[attr-defined]
        assert ("estimating layout 7 of 9" in written) is terminal
        assert terminal or not written
