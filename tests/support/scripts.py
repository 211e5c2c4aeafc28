"""Programs of this repository that are no part of the package, as modules: their functions are called in this process."""

import importlib
import importlib.util
import sys
from types import ModuleType

import pytest

from tests.support.processes import ROOT


def load_script(path: str) -> ModuleType:
    """A program by its path in the repository; its ``main`` is not run."""
    # The whole path: programs in two folders may have the same name.
    name = "script_" + path.removesuffix(".py").replace("/", "_")
    specification = importlib.util.spec_from_file_location(name, ROOT / path)
    assert specification is not None and specification.loader is not None
    module = importlib.util.module_from_spec(specification)
    sys.modules[name] = module  # where dataclasses look for it
    specification.loader.exec_module(module)
    return module


def load_benchmark(name: str, monkeypatch: pytest.MonkeyPatch) -> ModuleType:
    """A benchmark; until the test's end it finds the modules of its folder, as it does when Python runs it."""
    monkeypatch.syspath_prepend(str(ROOT / "benchmarks"))
    # Another module by this name may have been imported from elsewhere.
    monkeypatch.delitem(sys.modules, name, raising=False)
    return importlib.import_module(name)
