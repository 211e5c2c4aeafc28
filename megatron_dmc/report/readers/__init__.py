"""The kinds of runs that a report can be made of: one reader each, which are told apart by the files in the folder."""

from megatron_dmc.report.readers.read import read_run

__all__ = ["read_run"]
