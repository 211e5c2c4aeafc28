"""Keeps megatron-core from loading a compiler that nothing uses where there is no GPU.

Some forty of its functions are handed to ``torch.compile`` when they are defined. That alone imports torch's compiler, which
takes as long as torch itself, in every process. Nothing here calls them on a CPU.
"""

import functools
import importlib.util
import sys
from collections.abc import Callable, Sequence
from importlib.machinery import ModuleSpec
from types import ModuleType
from typing import Any

_NAME = "megatron.core"


def install() -> None:
    """For the first import of megatron-core in this process; whoever has imported it before has it as it is."""
    if _NAME not in sys.modules:
        sys.meta_path.insert(0, _Finder())


class _Finder:
    def find_spec(self, name: str, path: Sequence[str] | None = None, target: Any = None) -> ModuleSpec | None:
        if name != _NAME:
            return None
        sys.meta_path.remove(self)
        spec = importlib.util.find_spec(name)
        if spec is not None and spec.loader is not None:
            # Of this one loader, which loads nothing else.
            spec.loader.exec_module = functools.partial(_execute, spec.loader.exec_module)  # type: ignore[method-assign]
        return spec


def _execute(execute: Callable[[ModuleType], None], module: ModuleType) -> None:
    import torch

    if torch.cuda.is_available():
        execute(module)
        return
    compiles = torch.compile
    torch.compile = _as_it_is
    try:
        execute(module)
    finally:
        torch.compile = compiles


def _as_it_is(model: Any = None, **_: Any) -> Any:
    """torch.compile, a decorator with or without arguments, that compiles nothing."""
    return _as_it_is if model is None else model
