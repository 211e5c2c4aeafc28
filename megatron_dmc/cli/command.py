"""Reads the command line, runs one subcommand, and turns errors into one line and an exit status.

A subcommand is a module with ``HELP``, ``add_arguments`` and ``run``. No module here imports torch before its ``run`` is
called: help and wrong flags answer at once.
"""

import argparse
import contextlib
import errno
import os
import signal
import sys
import threading
import warnings
from collections.abc import Iterator, Sequence
from types import FrameType
from typing import Protocol

from megatron_dmc.cli import (
    cluster_check,
    compare,
    convert_from_hf,
    convert_from_megatron,
    convert_to_hf,
    evaluate,
    generate,
    group_heads,
    inspect,
    measure,
    plan,
    preprocess,
    quickstart,
    quickstart_evaluate,
    ratios,
    recipes,
    report,
    retrofit,
)
from megatron_dmc.cli.common import Parser
from megatron_dmc.cli.version import ShowVersions
from megatron_dmc.distributed.launcher import ThisRankError, check_runs_alone, report_failure
from megatron_dmc.errors import DMCError, Terminated
from megatron_dmc.files import is_full_disk
from megatron_dmc.terminal import drop_output_of_closed_terminal

# Exit statuses as a shell gives them: 128 and the signal's number.
INTERRUPTED = 128 + signal.SIGINT
PIPE_CLOSED = 128 + signal.SIGPIPE
# Each would end the process at once: a scheduler's, a terminal's that closes, and a time limit's.
_ENDING = (signal.SIGTERM, signal.SIGHUP, signal.SIGUSR1)


class Command(Protocol):
    """A subcommand's module.

    Attributes:
        HELP: one line for the list of commands; empty: the command is a part of another and is not listed.
    """

    HELP: str

    def add_arguments(self, parser: argparse.ArgumentParser) -> None: ...

    def run(self, options: argparse.Namespace) -> int | None:
        """Does the work; its docstring is the help's description. Returns an exit status; None is 0."""


COMMANDS: dict[str, Command] = {
    "retrofit": retrofit,
    "plan": plan,
    "inspect": inspect,
    "generate": generate,
    "evaluate": evaluate,
    "ratios": ratios,
    "convert-from-hf": convert_from_hf,
    "convert-from-megatron": convert_from_megatron,
    "convert-to-hf": convert_to_hf,
    "group-heads": group_heads,
    "preprocess": preprocess,
    "cluster-check": cluster_check,
    "quickstart": quickstart,
    "recipes": recipes,
    "compare": compare,
    "report": report,
    "quickstart-evaluate": quickstart_evaluate,
    "measure": measure,
}


def main(arguments: Sequence[str] | None = None) -> int:
    """``megatron-dmc``. Returns its exit status.

    0: done. 1: bad input, or a run that cannot go on, after one line on stderr; ``plan`` ends in 2 there. 2: wrong flags.
    75: a run that was asked to stop has saved. 130: interrupted. 141: nobody reads what is printed. 128 and a signal's
    number (129, 138, 143): ended by SIGHUP, SIGUSR1 or SIGTERM, with nothing left half written.
    """
    ends = arguments is None
    arguments = sys.argv[1:] if arguments is None else arguments
    parser = Parser(prog="megatron-dmc", description="Retrofit LLMs with Dynamic Memory Compression on megatron-core.")
    parser.add_argument("--version", action=ShowVersions)
    commands = parser.add_subparsers(required=True, metavar="COMMAND")
    for name, command in COMMANDS.items():
        if command.HELP:
            _add_to(commands.add_parser(name, help=command.HELP), command)
        elif name in arguments:
            # A part of another command. argparse would list it to somebody who mistypes a name.
            _add_to(commands.add_parser(name), command)
    return _run("megatron-dmc", _parse(parser, arguments), ends=ends)


def run_alone(command: Command, program: str, arguments: Sequence[str] | None = None) -> int:
    """One command as a program of its own, such as ``python tools/preprocess_data.py``. Returns its exit status."""
    parser = Parser(prog=program)
    _add_to(parser, command)
    return _run(program.removesuffix(".py"), _parse(parser, arguments), ends=arguments is None)


def _add_to(parser: argparse.ArgumentParser, command: Command) -> None:
    parser.description = command.run.__doc__
    # A command is made for one process, and ends in 1 where it fails, unless its module says otherwise.
    parser.set_defaults(run=command.run, failed=1, alone=True)
    command.add_arguments(parser)


def _parse(parser: argparse.ArgumentParser, arguments: Sequence[str] | None) -> argparse.Namespace:
    """Overrides may stand anywhere after the recipe; argparse by itself takes them from one place only."""
    parsed, rest = parser.parse_known_args(arguments)
    takes = hasattr(parsed, "overrides")
    unknown = [word for word in rest if not takes or word.startswith("-") or "=" not in word]
    if unknown:
        parser.error(f"unrecognized arguments: {' '.join(unknown)}")
    if rest:
        parsed.overrides += rest
    return parsed


def _run(program: str, options: argparse.Namespace, *, ends: bool) -> int:
    """The one place that turns an error into a line and an exit status. Errors of our own code keep their traceback.

    Args:
        ends: the command line is the process's own, which ends after it.
    """
    # megatron-core warns of every optional package that is missing, when it is imported.
    warnings.filterwarnings("ignore", module=r"megatron\.core")
    received: list[int] = []
    try:
        if options.alone:
            check_runs_alone()
        with _signals_interrupt(received, ends):
            status = options.run(options) or 0
            # A reader that has gone is noticed here at the latest, not while Python exits.
            sys.stdout.flush()
            return int(status)
    except KeyboardInterrupt as interrupt:
        print(f"{program}: {', '.join(['interrupted', *map(str, interrupt.args)])}", file=sys.stderr)
        return 128 + received[0] if received else INTERRUPTED
    except BrokenPipeError:
        # What is still buffered would fail again at exit.
        with contextlib.suppress(OSError, ValueError):
            os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        return PIPE_CLOSED
    except SystemExit as end:
        # What rich makes of a closed pipe, once it has silenced stdout.
        if isinstance(end.__context__, BrokenPipeError):
            return PIPE_CLOSED
        raise
    except (DMCError, OSError) as error:
        report_failure(f"{program}: {_line(error)}", of_this_rank=isinstance(error, ThisRankError))
        return int(options.failed)


def _line(error: DMCError | OSError) -> str:
    """The line that a user reads for an error; raises it again where it names nothing that a user could mend."""
    if isinstance(error, DMCError):
        return str(error)
    if error.filename is not None:
        return f"{os.fsdecode(error.filename)}: {error.strerror}"
    if is_full_disk(error):
        return f"{error.strerror or os.strerror(errno.ENOSPC)}; free some space, or write to another disk"
    raise error


@contextlib.contextmanager
def _signals_interrupt(received: list[int], ends: bool) -> Iterator[None]:
    """A signal of ``_ENDING`` ends a command as Ctrl-C does, so that it leaves nothing half written.

    Args:
        received: gets the numbers of the signals that come.
        ends: the process ends after the command. That takes torch a moment, and must not change the exit status: from the
            command's end on the signals are ignored. Otherwise their handlers are restored.
    """
    if threading.current_thread() is not threading.main_thread():
        yield
        return

    def interrupt(number: int, frame: FrameType | None) -> None:
        received.append(number)
        if number == signal.SIGHUP:
            drop_output_of_closed_terminal()
        # A closed terminal's SIGHUP comes from the kernel and from the shell: the second must not stop what cleans up.
        if len(received) == 1:
            raise Terminated

    # One that is ignored stays so: nohup has a command go on without its terminal.
    heeded = [number for number in _ENDING if signal.getsignal(number) != signal.SIG_IGN]
    before = {number: signal.signal(number, interrupt) for number in heeded}
    try:
        yield
    finally:
        for number, handler in before.items():
            signal.signal(number, signal.SIG_IGN if ends else handler or signal.SIG_DFL)
