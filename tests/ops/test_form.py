"""The form of the code of ops: few arguments, packages that only export, an oracle and a README in every folder."""

import ast
from pathlib import Path

import pytest

import megatron_dmc.ops
from tests.support.kernels import is_kernel

OPS = Path(megatron_dmc.ops.__file__).parent
FOLDERS = sorted(path.parent for path in OPS.glob("*/__init__.py"))
# Its signature is public.
EXCEPTIONS = {"LayerCache.attend"}
MOST = 6


def long_signatures(tree: ast.AST, owner: str = "", forced: bool = False) -> list[str]:
    """Functions with more than MOST positional arguments, self not counted; autograd forces forward and backward, and
    Triton its kernels."""
    found = []
    for node in ast.iter_child_nodes(tree):
        if isinstance(node, ast.ClassDef):
            bases = {ast.unparse(base) for base in node.bases}
            found += long_signatures(node, f"{node.name}.", "torch.autograd.Function" in bases)
        elif isinstance(node, ast.FunctionDef):
            names = [x.arg for x in (*node.args.posonlyargs, *node.args.args) if x.arg not in ("self", "cls")]
            chosen = not (forced and node.name in ("forward", "backward")) and not is_kernel(node)
            if len(names) > MOST and chosen:
                found.append(owner + node.name)
            found += long_signatures(node, owner + node.name + ".")
        else:
            found += long_signatures(node, owner)
    return found


def test_no_function_takes_more_than_six_positional_arguments() -> None:
    found = {
        f"{path.relative_to(OPS)}: {name}"
        for path in OPS.rglob("*.py")
        for name in long_signatures(ast.parse(path.read_text(encoding="utf-8")))
        if name not in EXCEPTIONS
    }
    assert not found


@pytest.mark.parametrize("folder", FOLDERS, ids=lambda folder: folder.name)
def test_a_folder_only_exports_and_has_an_oracle_and_a_readme(folder: Path) -> None:
    assert (folder / "naive.py").is_file() and (folder / "README.md").is_file()
    for node in ast.parse((folder / "__init__.py").read_text(encoding="utf-8")).body:
        docstring = isinstance(node, ast.Expr) and isinstance(node.value, ast.Constant)
        exports = isinstance(node, ast.Assign) and ast.unparse(node.targets[0]) == "__all__"
        assert docstring or exports or isinstance(node, ast.ImportFrom), ast.unparse(node)
