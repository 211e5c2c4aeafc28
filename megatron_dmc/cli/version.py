"""``megatron-dmc --version``."""

import argparse
import platform
from importlib.metadata import PackageNotFoundError, version
from typing import Any

from megatron_dmc import __version__


class ShowVersions(argparse.Action):
    """Prints the versions that a report of an error should name, and exits. The packages are not imported."""

    def __init__(self, option_strings: list[str], dest: str, **_: Any) -> None:
        super().__init__(
            option_strings, dest, nargs=0, help="print the versions of megatron-dmc, torch, megatron-core and Python"
        )

    def __call__(self, parser: argparse.ArgumentParser, *_: Any, **__: Any) -> None:
        print(
            f"megatron-dmc {__version__} (torch {_installed('torch')}, megatron-core {_installed('megatron-core')}, "
            f"Python {platform.python_version()})"
        )
        parser.exit()


def _installed(package: str) -> str:
    try:
        return version(package)
    except PackageNotFoundError:
        return "is not installed"
