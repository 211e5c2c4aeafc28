"""The ``megatron-dmc`` command: one file per subcommand. Only this room knows flags, and only it ends a process."""

from megatron_dmc.cli.command import main, run_alone

__all__ = ["main", "run_alone"]
