"""The ``megatron-dmc`` command."""

import argparse
import os
import sys
import warnings
from collections.abc import Sequence

from megatron_dmc.config import ConfigError
from megatron_dmc.training.signals import STOPPED, stop_request

_BASE = "where an adapter's base checkpoint is now, if it has been moved"


def main(arguments: Sequence[str] | None = None) -> int:
    """Runs one command; bad input ends in one line on stderr and exit status 1, a run that was asked to stop in 75."""
    parsed = _parse(arguments)
    # megatron-core warns of every optional package that is not there, when it is imported.
    warnings.filterwarnings("ignore", module=r"megatron\.core")
    try:
        return int(parsed.run(parsed) or 0)
    except KeyboardInterrupt:
        print("megatron-dmc: interrupted", file=sys.stderr)
        return 130
    except Exception as error:
        if not _is_users(error):
            raise
        print(f"megatron-dmc: {error}", file=sys.stderr)
        return 1


def _parse(arguments: Sequence[str] | None) -> argparse.Namespace:
    """Overrides may stand anywhere behind the recipe; argparse alone takes them from one place only."""
    parser = _parser()
    parsed, rest = parser.parse_known_args(arguments)
    if rest and (not hasattr(parsed, "overrides") or any(word.startswith("-") or "=" not in word for word in rest)):
        parser.error(f"unrecognized arguments: {' '.join(rest)}")
    if rest:
        parsed.overrides += rest
    return parsed


def _is_users(error: Exception) -> bool:
    """Whether the message alone helps: bad settings, bad files, a run that diverged."""
    # Before the imports, which take seconds.
    if isinstance(error, ConfigError):
        return True
    from megatron_dmc.checkpoint import CheckpointError
    from megatron_dmc.training.trainer import TrainingError

    return isinstance(error, (CheckpointError, TrainingError))


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(
        prog="megatron-dmc", description="Retrofit LLMs with Dynamic Memory Compression on megatron-core."
    )
    commands = parser.add_subparsers(required=True, metavar="COMMAND")

    retrofit = commands.add_parser(
        "retrofit", help="run a recipe: all its phases, resuming where it stopped", description=_retrofit.__doc__
    )
    retrofit.add_argument("recipe", help="a YAML recipe, see examples/")
    retrofit.add_argument("overrides", nargs="*", metavar="section.field=value", help="settings over the recipe's")
    retrofit.set_defaults(run=_retrofit)

    plan = commands.add_parser(
        "plan", help="memory, traffic, time and cost of a recipe, before any GPU is used", description=_plan.__doc__
    )
    plan.add_argument("recipe", help="a YAML recipe, see examples/")
    plan.add_argument("overrides", nargs="*", metavar="section.field=value", help="settings over the recipe's")
    plan.add_argument("--nodes", type=int, required=True)
    plan.add_argument("--gpus-per-node", type=int, default=8)
    plan.add_argument("--gpu", default="h100", help="a100-40, a100-80, h100 (default), h200 or b200")
    plan.add_argument(
        "--mfu", type=float, default=0.4, help="part of the GPU's peak reached while nothing waits (default: 0.4)"
    )
    plan.add_argument("--search", action="store_true", help="also the fastest layouts that fit")
    plan.add_argument("--json", action="store_true", help="print JSON instead of tables")
    plan.set_defaults(run=_plan)

    inspect = commands.add_parser(
        "inspect", help="compression ratio of every layer and head on a text", description=_inspect.__doc__
    )
    inspect.add_argument("checkpoint", help="a checkpoint folder, or a run's folder of them")
    inspect.add_argument("--base", metavar="FOLDER", help=_BASE)
    inspect.add_argument("--text", help="a text file; by default Python's own sources")
    inspect.add_argument("--tokens", type=int, help="tokens to read (default: 2048, or the model's positions if fewer)")
    inspect.add_argument("--json", action="store_true", help="print JSON instead of a table")
    inspect.set_defaults(run=_inspect)

    generate = commands.add_parser("generate", help="continue a text", description=_generate.__doc__)
    generate.add_argument("checkpoint", help="a checkpoint folder")
    generate.add_argument("--base", metavar="FOLDER", help=_BASE)
    generate.add_argument("--prompt", required=True)
    generate.add_argument("--max-new-tokens", type=int, default=64)
    generate.add_argument("--temperature", type=float, default=0.0, help="0 (default) is greedy")
    generate.add_argument("--seed", type=int, default=0)
    generate.set_defaults(run=_generate)
    return parser


def _retrofit(parsed: argparse.Namespace) -> int:
    """Runs a recipe on the processes that torchrun or srun started, or on this one alone. On Ctrl-C, SIGUSR1 or SIGTERM it
    saves after the current step and exits with status 75; the same command goes on from there. A second Ctrl-C stops at
    once."""
    # Before the imports, which take seconds: until then a signal ends the process.
    with stop_request() as request:
        from megatron_dmc.recipe import load_recipe

        recipe = load_recipe(parsed.recipe, parsed.overrides)

        from megatron_dmc.distributed.world import world
        from megatron_dmc.training.trainer import Trainer

        with world(recipe.parallel):
            trainer = Trainer(recipe, request)
            trainer.run()
        return STOPPED if trainer.stopped else 0


def _plan(parsed: argparse.Namespace) -> int:
    """Says what a recipe needs on so many GPUs. Exit status: 0 it fits, 1 it does not, 2 bad input."""
    # The real model on the meta device: what is planned must not depend on the machine that plans.
    os.environ["CUDA_VISIBLE_DEVICES"] = ""
    warnings.filterwarnings("ignore", module=r"torch\.distributed")
    from megatron_dmc.recipe import load_recipe

    try:
        recipe = load_recipe(parsed.recipe, parsed.overrides)

        from megatron_dmc.plan.estimate import Cluster, make_plan
        from megatron_dmc.plan.gpus import find_gpu
        from megatron_dmc.plan.memory import Footprints
        from megatron_dmc.plan.report import print_json, print_plan
        from megatron_dmc.plan.search import search, smaller_plan

        cluster = Cluster(parsed.nodes, parsed.gpus_per_node, find_gpu(parsed.gpu), parsed.mfu)
        footprints = Footprints()
        plan = make_plan(recipe, cluster, footprints)
    except ConfigError as error:
        print(f"megatron-dmc: {error}", file=sys.stderr)
        return 2
    smaller = None if plan.fits else smaller_plan(plan, footprints)
    found = search(recipe, cluster, footprints=footprints) if parsed.search else None
    (print_json if parsed.json else print_plan)(plan, smaller, found)
    return 0 if plan.fits else 1


def _inspect(parsed: argparse.Namespace) -> None:
    """Shows what a checkpoint's decisions do to a text: the ratio of every layer and head, and the bytes saved. For a folder
    of checkpoints it lists them, with the ratios they were saved at."""
    from megatron_dmc.distributed.world import world
    from megatron_dmc.evaluation.inspect import run

    with world():
        run(parsed.checkpoint, parsed.text, parsed.tokens, as_json=parsed.json, base=parsed.base)


def _generate(parsed: argparse.Namespace) -> None:
    """Continues a prompt with the compressed cache and prints the text."""
    from megatron_dmc.distributed.world import world
    from megatron_dmc.inference.generate import run

    with world():
        run(parsed.checkpoint, parsed.prompt, parsed.max_new_tokens, parsed.temperature, parsed.seed, base=parsed.base)
