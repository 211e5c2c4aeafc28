"""Programs on a machine with torch and transformers, and without this project and what it needs."""

from pathlib import Path

from tests.support.processes import run

_ALONE = """
import importlib.abc, sys

class Missing(importlib.abc.MetaPathFinder):
    def find_spec(self, name, path=None, target=None):
        if name.split(".")[0] in ("megatron_dmc", "megatron", "omegaconf", "triton"):
            raise ModuleNotFoundError(name)

sys.meta_path.insert(0, Missing())
"""


def run_as_stranger(program: str, *arguments: object, folder: Path) -> str:
    """Runs a program that has to end with the line "fine".

    Args:
        arguments: the program's ``sys.argv[1:]``.
        folder: an empty home of transformers' cache is made there.

    Returns:
        What it wrote to stderr.
    """
    home = str(folder / "home")
    done = run("-c", _ALONE + program, *arguments, folder=folder, HF_HOME=home, HF_HUB_OFFLINE="1")
    assert done.returncode == 0, done.stderr
    assert done.stdout.endswith("fine\n")
    return done.stderr
