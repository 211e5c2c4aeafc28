"""The ``megatron-dmc`` command."""

import argparse
import sys
import warnings
from collections.abc import Sequence

from megatron_dmc.config import ConfigError

_BASE = "where an adapter's base checkpoint is now, if it has been moved"


def main(arguments: Sequence[str] | None = None) -> int:
    """Runs one command; bad input ends in one line on stderr and exit status 1."""
    parsed = _parser().parse_args(arguments)
    # megatron-core warns of every optional package that is not there, when it is imported.
    warnings.filterwarnings("ignore", module=r"megatron\.core")
    try:
        parsed.run(parsed)
    except KeyboardInterrupt:
        print("megatron-dmc: interrupted", file=sys.stderr)
        return 130
    except Exception as error:
        if not _is_users(error):
            raise
        print(f"megatron-dmc: {error}", file=sys.stderr)
        return 1
    return 0


def _is_users(error: Exception) -> bool:
    """Whether the message alone helps: bad settings, bad files, a run that diverged."""
    from megatron_dmc.training.checkpoint import CheckpointError
    from megatron_dmc.training.trainer import TrainingError

    return isinstance(error, (ConfigError, CheckpointError, TrainingError))


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

    inspect = commands.add_parser(
        "inspect", help="compression ratio of every layer and head on a text", description=_inspect.__doc__
    )
    inspect.add_argument("checkpoint", help="a checkpoint folder")
    inspect.add_argument("--base", metavar="FOLDER", help=_BASE)
    inspect.add_argument("--text", help="a text file; by default Python's own sources")
    inspect.add_argument("--tokens", type=int, default=2048, help="tokens to read (default: 2048)")
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


def _retrofit(parsed: argparse.Namespace) -> None:
    """Runs a recipe on the processes that torchrun started, or on this one alone."""
    from megatron_dmc.training.arguments import load_recipe

    recipe = load_recipe(parsed.recipe, parsed.overrides)

    from megatron_dmc.training.distributed import world
    from megatron_dmc.training.trainer import Trainer

    with world(recipe.parallel):
        Trainer(recipe).run()


def _inspect(parsed: argparse.Namespace) -> None:
    """Shows what a checkpoint's decisions do to a text: the ratio of every layer and head, and the bytes saved."""
    from megatron_dmc.evaluation.inspect import run
    from megatron_dmc.training.distributed import world

    with world():
        run(parsed.checkpoint, parsed.text, parsed.tokens, as_json=parsed.json, base=parsed.base)


def _generate(parsed: argparse.Namespace) -> None:
    """Continues a prompt with the compressed cache and prints the text."""
    from megatron_dmc.inference.generate import run
    from megatron_dmc.training.distributed import world

    with world():
        run(parsed.checkpoint, parsed.prompt, parsed.max_new_tokens, parsed.temperature, parsed.seed, base=parsed.base)
