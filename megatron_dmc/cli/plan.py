"""``megatron-dmc plan``."""

import argparse
import os
import warnings

from megatron_dmc.cli.common import add_recipe

HELP = "memory, traffic, time and cost of a recipe, before any GPU is used"


def add_arguments(parser: argparse.ArgumentParser) -> None:
    # 1 means that it does not fit.
    parser.set_defaults(failed=2)
    add_recipe(parser)
    parser.add_argument("--nodes", type=int, required=True, help="how many machines")
    parser.add_argument(
        "--gpus-per-node", type=int, default=8, help="GPUs of each; 1 also for a run on a CPU (default: %(default)s)"
    )
    parser.add_argument("--gpu", default="h100", help="a100-40, a100-80, h100 (default), h200 or b200")
    parser.add_argument(
        "--mfu",
        type=float,
        default=0.4,
        help="part of the GPU's peak reached while nothing waits (default: %(default)s)",
    )
    parser.add_argument("--search", action="store_true", help="also the fastest layouts that fit, as overrides to copy")
    parser.add_argument("--json", action="store_true", help="print JSON instead of tables")


def run(options: argparse.Namespace) -> int:
    """Says what a recipe needs on so many GPUs. Exit status: 0 it fits, 1 it does not, 2 bad input."""
    # The real model on the meta device: what is planned must not depend on the machine that plans.
    os.environ["CUDA_VISIBLE_DEVICES"] = ""
    warnings.filterwarnings("ignore", module=r"torch\.distributed")
    # Everything that can be refused is refused before the imports below, which take seconds.
    from megatron_dmc.plan.cluster import Cluster, find_layout
    from megatron_dmc.plan.gpus import find_gpu
    from megatron_dmc.recipe import load_recipe

    cluster = Cluster(options.nodes, options.gpus_per_node, find_gpu(options.gpu), options.mfu)
    recipe = load_recipe(options.recipe, options.overrides)
    find_layout(recipe, cluster)

    from megatron_dmc.plan.progress import progress

    with progress() as show:
        show("loading megatron-core")
        from megatron_dmc.plan.estimate import make_plan
        from megatron_dmc.plan.memory import Footprints
        from megatron_dmc.plan.report import print_json, print_plan
        from megatron_dmc.plan.search import search, smaller_plan

        footprints = Footprints()
        show("planning the recipe")
        plan = make_plan(recipe, cluster, footprints)
        smaller = None if plan.fits else smaller_plan(plan, footprints)
        found = search(recipe, cluster, footprints=footprints, show=show) if options.search else None
    (print_json if options.json else print_plan)(plan, smaller, found)
    return 0 if plan.fits else 1
