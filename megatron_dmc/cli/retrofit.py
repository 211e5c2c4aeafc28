"""``megatron-dmc retrofit``."""

import argparse

from megatron_dmc.cli.common import add_recipe

HELP = "run a recipe: all its phases, resuming where it stopped"


def add_arguments(parser: argparse.ArgumentParser) -> None:
    add_recipe(parser)
    parser.set_defaults(alone=False)


def run(options: argparse.Namespace) -> int:
    """Runs a recipe on the processes that torchrun or srun started, or on this one alone. On Ctrl-C, SIGUSR1, SIGTERM, or when
    its terminal closes, it saves after the current step and exits with status 75; the same command goes on from there. A
    second Ctrl-C stops at once."""
    from megatron_dmc.training.signals import STOPPED, stop_request

    # Before the other imports, which take seconds.
    with stop_request() as request:
        from megatron_dmc.recipe import load_recipe

        recipe = load_recipe(options.recipe, options.overrides)

        from megatron_dmc.distributed.world import world
        from megatron_dmc.training.trainer import Trainer

        with world(recipe.parallel, must_stop=lambda: request.received is not None):
            trainer = Trainer(recipe, request)
            trainer.run()
        return STOPPED if trainer.stopped else 0
