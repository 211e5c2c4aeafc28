"""The floors of the code, read from its imports. Each rule gives its problems, one line each; it must have none here.

Below, each rule is also fed a small made-up tree that breaks it: a rule that cannot fail says nothing.
"""

import ast
import sys
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest

from tests.support.imports import Modules
from tests.support.kernels import is_kernel
from tests.support.processes import ROOT

# From the ground up: a room imports the floors below, and of its own floor only itself.
FLOORS = (
    ("megatron_dmc", "config", "errors", "files", "megatron_import", "terminal"),
    ("ops",),
    ("model", "hf"),
    ("recipe",),
    ("data", "distributed"),
    ("checkpoint",),
    ("calibration",),
    ("training", "convert", "inference", "serving"),
    ("evaluation", "baselines", "report", "plan", "cluster_check"),
    ("experiments", "cli", "__main__"),
)
FLOOR_OF = {room: number for number, floor in enumerate(FLOORS) for room in floor}
# Imports on one floor that are allowed: (from, to), and why.
ALLOWED = {
    ("megatron_dmc", "config"): "the package offers DMCConfig under its own name",
    ("megatron_dmc", "errors"): "the package offers its errors under its own name",
    ("megatron_dmc", "megatron_import"): "it must be there before anything imports megatron-core",
    ("config", "errors"): "a wrong setting is an error",
    ("__main__", "cli"): "python -m megatron_dmc and python -m megatron_dmc.cluster_check are commands",
    ("report", "evaluation"): "it shows what evaluation has measured, and reads models and texts as evaluation does",
    ("cli", "experiments"): "megatron-dmc quickstart and recipes run them",
}
# Modules below it are what exports start from, one per family.
EXPORTED = "megatron_dmc.hf.families."
# What serving imports of this package.
MAY_BE_SERVED = {"serving", "hf", "ops", "config", "errors"}
# safetensors is no further need: transformers requires it. Nor is what is imported in a try block: decode's kernels are made
# with Triton where it is there, and transformers does not ask for what such a block imports.
EXPORT_NEEDS = {"torch", "transformers", "safetensors"}
EXPORT_MAY_USE = {"triton"}
# Benchmarks import the modules of their own folder: one function adds that folder for a test, as Python does.
# A stand-in for Transformer Engine, which is not on a machine without a GPU, must be found as a package.
MAY_EDIT_THE_PATH = {"tests.support.scripts", "tests.training.test_transformer_engine_version"}

MOST_POSITIONAL = 6
# Whoever calls these chose their arguments.
MAY_HAVE_MORE = {
    "megatron_dmc.baselines.press._attend": "transformers' interface of attention, as kvpress calls it",
    "megatron_dmc.distributed.adam.GroupAdamW.__init__": "apex' FusedAdam, which megatron-core calls",
    "megatron_dmc.hf.modeling_dmc.DMCModel.forward": "transformers' LlamaModel",
    "megatron_dmc.hf.modeling_dmc.DMCForCausalLM.forward": "transformers' LlamaForCausalLM",
    "megatron_dmc.model.attention.DMCSelfAttention.forward": "megatron-core's SelfAttention",
    "megatron_dmc.ops.attention.context_parallel._GatheredAttention.forward": "autograd: States, one by one",
    "megatron_dmc.ops.attention.slot_attention.SlotAttention.forward": "autograd: States, one by one",
    "megatron_dmc.ops.decode.layer_cache.LayerCache.attend": "promised to its users",
}


def room(module: str) -> str:
    """``a`` of ``megatron_dmc.a.b``; the package itself is a room, too, and so are all modules that ``python -m`` runs."""
    parts = module.split(".")
    if parts[-1] == "__main__":
        return "__main__"
    return parts[1] if len(parts) > 1 else parts[0]


def is_ours(name: str) -> bool:
    return name.split(".")[0] == "megatron_dmc"


def imports_that_go_up(package: Modules) -> Iterator[str]:
    for homeless in sorted({room(module) for module in package.paths} - set(FLOOR_OF)):
        yield f"{homeless} has no floor; give it one in FLOORS"
    for found in package.all_imports():
        here, there = room(found.module), room(found.name)
        if found.name.split(".")[0] in ("tests", "benchmarks"):
            yield f"{found.place}: {here} imports {found.name}, which is not part of the package"
        if not is_ours(found.name) or here == there or not {here, there} <= set(FLOOR_OF):
            continue
        if FLOOR_OF[there] >= FLOOR_OF[here] and (here, there) not in ALLOWED:
            yield (
                f"{found.place}: {here} (floor {FLOOR_OF[here]}) imports {found.name} ({there} is floor {FLOOR_OF[there]})"
            )


def imports_of_ops(package: Modules) -> Iterator[str]:
    """Operations know tensors: neither Megatron nor anything else of this project."""
    for found in package.all_imports():
        if room(found.module) != "ops":
            continue
        other_room = is_ours(found.name) and room(found.name) != "ops"
        if found.name.split(".")[0] == "megatron" or other_room:
            yield f"{found.place}: ops imports {found.name}"


def imports_of_serving(package: Modules) -> Iterator[str]:
    """The engine's environment has torch and transformers, and no Megatron."""
    for found in package.all_imports():
        if room(found.module) != "serving":
            continue
        is_other_room = is_ours(found.name) and room(found.name) not in MAY_BE_SERVED
        if found.name.split(".")[0] == "megatron" or is_other_room:
            yield f"{found.place}: serving imports {found.name}"


def imports_of_an_export(package: Modules) -> Iterator[str]:
    """The code that is copied with exported weights runs where torch and transformers are installed."""
    entries = [module for module in package.paths if module.startswith(EXPORTED)]
    for module in sorted(set().union(*(package.closure(entry) for entry in entries))):
        for found in package.imports(module):
            top = found.name.split(".")[0]
            if found.may_fail and top in EXPORT_MAY_USE:
                continue
            if not is_ours(found.name) and top not in EXPORT_NEEDS and top not in sys.stdlib_module_names:
                yield f"{found.place}: an export would need {found.name}"


def ops_without_an_oracle(package: Modules, tests: Modules) -> Iterator[str]:
    """Every folder of ops holds naive.py, and a module of tests/ops imports the folder or a part of it."""
    tested = {found.name for found in tests.all_imports() if found.module.startswith("tests.ops.test_")}
    for module, path in package.paths.items():
        if path.name != "__init__.py" or not module.startswith("megatron_dmc.ops."):
            continue
        if f"{module}.naive" not in package.paths:
            yield f"{module} has no naive.py"
        if not any(name == module or name.startswith(f"{module}.") for name in tested):
            yield f"{module} has no test in tests/ops that imports it"


def long_calls(package: Modules) -> Iterator[str]:
    """What travels together is one dataclass or NamedTuple, and what has a default is named by the caller."""
    for module in package.paths:
        for name, function in _functions(package.tree(module), module):
            arguments = [*function.args.posonlyargs, *function.args.args]
            first = arguments[0].arg if arguments else ""
            count = len(arguments) - (first in ("self", "cls", "ctx"))
            if count > MOST_POSITIONAL and name not in MAY_HAVE_MORE and not is_kernel(function):
                yield f"{package.place(module, function.lineno)}: {name} takes {count} positional arguments"


def _functions(node: ast.AST, name: str) -> Iterator[tuple[str, ast.FunctionDef | ast.AsyncFunctionDef]]:
    for child in ast.iter_child_nodes(node):
        is_named = isinstance(child, ast.ClassDef | ast.FunctionDef | ast.AsyncFunctionDef)
        inner = f"{name}.{child.name}" if is_named else name
        if isinstance(child, ast.FunctionDef | ast.AsyncFunctionDef):
            yield inner, child
        yield from _functions(child, inner)


def imports_of_tests(tests: Modules) -> Iterator[str]:
    """What two tests share lies in tests/support."""
    for found in tests.all_imports():
        if any(part.startswith("test_") or part == "conftest" for part in found.name.split(".")):
            yield f"{found.place}: imports {found.name}; move what is shared to tests/support"


def edits_of_the_path(tests: Modules) -> Iterator[str]:
    for module in tests.paths:
        if module in MAY_EDIT_THE_PATH:
            continue
        for node in ast.walk(tests.tree(module)):
            if _edits_the_path(node):
                assert isinstance(node, ast.stmt | ast.expr)
                yield f"{tests.place(module, node.lineno)}: edits sys.path; import from the repository's root"


def _edits_the_path(node: ast.AST) -> bool:
    if isinstance(node, ast.Call) and isinstance(node.func, ast.Attribute):
        return node.func.attr in ("syspath_prepend", "addsitedir") or ast.unparse(node.func.value) == "sys.path"
    if isinstance(node, ast.Assign | ast.Delete):
        return any(ast.unparse(target).startswith("sys.path") for target in node.targets)
    if isinstance(node, ast.AugAssign):
        return ast.unparse(node.target) == "sys.path"
    return isinstance(node, ast.ImportFrom) and node.module == "sys" and "path" in [x.name for x in node.names]


@pytest.fixture(scope="module")
def package() -> Modules:
    return Modules(ROOT / "megatron_dmc")


@pytest.fixture(scope="module")
def tests() -> Modules:
    return Modules(ROOT / "tests")


@pytest.mark.parametrize(
    "rule",
    [imports_that_go_up, imports_of_ops, imports_of_serving, imports_of_an_export, long_calls],
    ids=lambda rule: rule.__name__,
)
def test_the_package_keeps(package: Modules, rule: Callable[[Modules], Iterator[str]]) -> None:
    problems = list(rule(package))
    assert not problems, "\n".join(problems)


@pytest.mark.parametrize("rule", [imports_of_tests, edits_of_the_path], ids=lambda rule: rule.__name__)
def test_the_tests_keep(tests: Modules, rule: Callable[[Modules], Iterator[str]]) -> None:
    problems = list(rule(tests))
    assert not problems, "\n".join(problems)


def test_every_op_has_an_oracle_and_a_test(package: Modules, tests: Modules) -> None:
    problems = list(ops_without_an_oracle(package, tests))
    assert not problems, "\n".join(problems)


def made_up(folder: Path, files: dict[str, str]) -> Modules:
    """A package of these files, by their paths; the folders' __init__.py are made where they are not given."""
    for name, text in files.items():
        path = folder / name
        path.parent.mkdir(parents=True, exist_ok=True)
        for parent in [x for x in path.parents if folder in x.parents]:
            (parent / "__init__.py").touch()
        path.write_text(text)
    return Modules(folder / next(iter(files)).split("/")[0])


@pytest.mark.parametrize(
    ("file", "text", "problem"),
    [
        (
            "ops/a.py",
            "from megatron_dmc.recipe import x",
            "ops (floor 1) imports megatron_dmc.recipe (recipe is floor 3)",
        ),
        ("data/a.py", "import megatron_dmc.cli.main", "data (floor 4) imports megatron_dmc.cli.main (cli is floor 9)"),
        ("data/a.py", "def f():\n    from megatron_dmc import training", "imports megatron_dmc.training (training is"),
        (
            "data/a.py",
            "if True:\n    from ..training import run",
            "imports megatron_dmc.training.run (training is floor 7)",
        ),
        ("data/__init__.py", "from .. import training", "imports megatron_dmc.training (training is floor 7)"),
        ("hf/a.py", "from megatron_dmc.model import x", "hf (floor 2) imports megatron_dmc.model (model is floor 2)"),
        (
            "inference/a.py",
            "from megatron_dmc.training import run",
            "inference (floor 7) imports megatron_dmc.training.run",
        ),
        ("config.py", "import megatron_dmc.ops", "config (floor 0) imports megatron_dmc.ops (ops is floor 1)"),
        ("attic/a.py", "", "attic has no floor"),
        (
            "data/a.py",
            "from importlib import import_module\nimport_module('megatron_dmc.training.run')",
            "imports megatron_dmc.training.run (training is floor 7)",
        ),
        (
            "data/a.py",
            "import importlib\nimportlib.import_module('..training', __package__)",
            "imports megatron_dmc.training (training is floor 7)",
        ),
        (
            "data/a.py",
            "def f():\n    return __import__('megatron_dmc.cli')",
            "imports megatron_dmc.cli (cli is floor 9)",
        ),
        ("data/a.py", "from tests.support import toy", "data imports tests.support, which is not part of the package"),
    ],
    ids=[
        "up",
        "far up",
        "in a function",
        "relative",
        "relative in a package",
        "aside",
        "aside above",
        "ground",
        "homeless",
        "by a call",
        "by a relative call",
        "by __import__",
        "tests",
    ],
)
def test_an_import_that_goes_up_is_found(tmp_path: Path, file: str, text: str, problem: str) -> None:
    rooms = {f"megatron_dmc/{name}/__init__.py": "" for name in ("ops", "model", "recipe", "training", "cli")}
    package = made_up(tmp_path, rooms | {"megatron_dmc/training/run.py": "", f"megatron_dmc/{file}": text})
    (found,) = imports_that_go_up(package)
    assert problem in found


def test_imports_that_go_down_are_let_be(tmp_path: Path) -> None:
    files = {
        "megatron_dmc/__init__.py": "from megatron_dmc.config import x",
        "megatron_dmc/__main__.py": "from megatron_dmc.cli import main",
        "megatron_dmc/config.py": "import torch",
        "megatron_dmc/ops/a.py": "from megatron_dmc.ops import b\nfrom . import c",
        "megatron_dmc/hf/configuration_dmc.py": "from megatron_dmc.config import x",
        "megatron_dmc/hf/cache.py": "from megatron_dmc.ops.a import y",
        "megatron_dmc/convert/to_hf.py": "import megatron_dmc\nfrom megatron_dmc.hf import cache",
        "megatron_dmc/cli/main.py": "from megatron_dmc.convert.to_hf import x\nimport megatron.core",
    }
    assert list(imports_that_go_up(made_up(tmp_path, files))) == []


@pytest.mark.parametrize(
    "text",
    [
        "import megatron.core",
        "def f():\n    from megatron import core",
        "from megatron_dmc.model import gpt",
        "from megatron_dmc.recipe.sections import x",
        "from megatron_dmc.config import DMCConfig",
        "from megatron_dmc import DMCConfig",
        "import importlib\nimportlib.import_module('megatron.core')",
    ],
)
def test_what_ops_may_not_import_is_found(tmp_path: Path, text: str) -> None:
    allowed = "import megatron_core_like\nfrom megatron_dmc.ops.rotary import y\n"
    package = made_up(tmp_path, {"megatron_dmc/ops/good.py": allowed, "megatron_dmc/ops/pooling/a.py": text})
    (found,) = imports_of_ops(package)
    assert found.startswith("megatron_dmc/ops/pooling/a.py:")


@pytest.mark.parametrize(
    "text",
    ["import megatron.core", "from megatron_dmc.recipe import base", "def f():\n    import megatron_dmc.model.gpt"],
)
def test_what_serving_may_not_import_is_found(tmp_path: Path, text: str) -> None:
    allowed = "import vllm\nfrom megatron_dmc.hf import x\nfrom megatron_dmc.serving.b import y\n"
    package = made_up(tmp_path, {"megatron_dmc/serving/good.py": allowed, "megatron_dmc/serving/a.py": text})
    (found,) = imports_of_serving(package)
    assert found.startswith("megatron_dmc/serving/a.py:")


def test_what_an_export_may_not_need_is_found_however_far(tmp_path: Path) -> None:
    files = {
        "megatron_dmc/hf/families/a.py": "import math\nimport torch\nfrom megatron_dmc.ops.pooling import pool\n",
        "megatron_dmc/ops/pooling/__init__.py": "from megatron_dmc.ops.pooling import fast\n",
        "megatron_dmc/ops/pooling/fast.py": "def f():\n    import omegaconf.base\n",
        "megatron_dmc/ops/other.py": "import triton\n",
    }
    problems = list(imports_of_an_export(made_up(tmp_path, files)))
    assert problems == ["megatron_dmc/ops/pooling/fast.py:2: an export would need omegaconf.base"]


@pytest.mark.parametrize(
    ("text", "problems"),
    [
        ("try:\n    import triton.language as tl\nexcept ImportError:\n    tl = None\n", []),
        ("try:\n    import numpy\nexcept ImportError:\n    pass\n", ["an export would need numpy"]),
        ("try:\n    import triton\nexcept ValueError:\n    pass\n", ["an export would need triton"]),
        ("try:\n    pass\nexcept ImportError:\n    import triton\n", ["an export would need triton"]),
        ("def f():\n    import triton\n", ["an export would need triton"]),
    ],
    ids=["in a try block", "another module", "another error", "in the handler", "in a function"],
)
def test_an_export_may_use_triton_where_it_is(tmp_path: Path, text: str, problems: list[str]) -> None:
    files = {"megatron_dmc/hf/families/a.py": text}
    found = [problem.split(": ")[1] for problem in imports_of_an_export(made_up(tmp_path, files))]
    assert found == problems


@pytest.mark.parametrize(
    "text",
    [
        "def f(a, b, c, d, e, g, h): ...",
        "class A:\n    def f(self, a, b, c, d, e, g, h=None): ...",
        "def f():\n    async def g(a, b, /, c, d, e, g, h, *, i): ...",
        "if True:\n    class A:\n        @staticmethod\n        def f(ctx, a, b, c, d, e, g, h): ...",
    ],
    ids=["function", "method", "inner", "autograd"],
)
def test_a_long_call_is_found(tmp_path: Path, text: str) -> None:
    short = "def f(a, b, c, d, e, g, *, h): ...\nclass A:\n    def f(self, a, b, c, d, e, g, *h): ...\n"
    short += "def kernel(a, b, c, d, e, g, H: tl.constexpr): ...\n"
    package = made_up(tmp_path, {"megatron_dmc/data/good.py": short, "megatron_dmc/data/a.py": text})
    (found,) = long_calls(package)
    assert found.startswith("megatron_dmc/data/a.py:") and found.endswith("takes 7 positional arguments")


def test_an_op_without_an_oracle_or_a_test_is_found(tmp_path: Path) -> None:
    package = made_up(
        tmp_path,
        {
            "megatron_dmc/ops/good/naive.py": "",
            "megatron_dmc/ops/untested/naive.py": "",
            "megatron_dmc/ops/unproven/__init__.py": "",
            "megatron_dmc/ops/rotary.py": "",
        },
    )
    tests = made_up(
        tmp_path,
        {
            "tests/ops/test_good.py": "from megatron_dmc.ops.good import naive",
            "tests/ops/test_unproven.py": "from megatron_dmc.ops.unproven.fast import x",
            "tests/model/test_model.py": "import megatron_dmc.ops.untested",
        },
    )
    assert list(ops_without_an_oracle(package, tests)) == [
        "megatron_dmc.ops.unproven has no naive.py",
        "megatron_dmc.ops.untested has no test in tests/ops that imports it",
    ]


@pytest.mark.parametrize(
    "text",
    [
        "from test_trainer import train",
        "from tests.training import test_trainer",
        "from tests.training.test_trainer import train",
        "def f():\n    import tests.training.test_trainer",
        "from .test_trainer import train",
        "from tests.conftest import one_process",
        "import importlib\nimportlib.import_module('tests.training.test_trainer')",
    ],
)
def test_a_test_that_imports_a_test_is_found(tmp_path: Path, text: str) -> None:
    files = {"tests/training/test_trainer.py": "from tests.support.toy import train", "tests/training/test_a.py": text}
    (found,) = imports_of_tests(made_up(tmp_path, files))
    assert found.startswith("tests/training/test_a.py:")


@pytest.mark.parametrize(
    "text",
    [
        "sys.path.insert(0, 'x')",
        "def f():\n    sys.path.append('x')",
        "sys.path = []",
        "sys.path[0] = 'x'",
        "sys.path += ['x']",
        "del sys.path[0]",
        "from sys import path",
        "monkeypatch.syspath_prepend('x')",
        "site.addsitedir('x')",
    ],
)
def test_an_edit_of_the_path_is_found(tmp_path: Path, text: str) -> None:
    reads = "import sys\nprint(sys.path, sys.path[0])\n"
    files = {"tests/test_a.py": text, "tests/test_b.py": reads, "tests/support/scripts.py": text}
    (found,) = edits_of_the_path(made_up(tmp_path, files))
    assert found.startswith("tests/test_a.py:")
