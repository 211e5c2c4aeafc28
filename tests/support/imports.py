"""What the modules of a tree of Python files import, read from their text: nothing is run."""

import ast
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path


@dataclass(frozen=True)
class Import:
    """One module that another one imports: at the top or inside a function, by a statement or by ``import_module("name")``.

    Attributes:
        place: the importing file and line, for messages.
        module: the importing module, with dots.
        name: the module that is imported; of ``from a import b`` it is ``a.b`` where that is a module of the tree, else ``a``.
        may_fail: it stands in a try block that catches ImportError.
    """

    place: str
    module: str
    name: str
    may_fail: bool = False


def imports_that_may_fail(tree: ast.AST) -> set[ast.AST]:
    """What stands in the first part of a try block that catches ImportError."""
    return {
        node
        for block in ast.walk(tree)
        if isinstance(block, ast.Try)
        and any(handler.type and ast.unparse(handler.type) == "ImportError" for handler in block.handlers)
        for statement in block.body
        for node in ast.walk(statement)
    }


class Modules:
    """The modules under a folder, which is itself a package.

    Attributes:
        paths: of each module's file, by the module's name with dots.
    """

    def __init__(self, folder: Path) -> None:
        self.root = folder.parent
        self.paths: Mapping[str, Path] = {self._name(path): path for path in sorted(folder.rglob("*.py"))}

    def _name(self, path: Path) -> str:
        parts = path.relative_to(self.root).with_suffix("").parts
        return ".".join(parts[:-1] if parts[-1] == "__init__" else parts)

    def place(self, module: str, line: int) -> str:
        return f"{self.paths[module].relative_to(self.root)}:{line}"

    def tree(self, module: str) -> ast.Module:
        return ast.parse(self.paths[module].read_text(encoding="utf-8"))

    def imports(self, module: str) -> Iterator[Import]:
        tree = self.tree(module)
        may_fail = imports_that_may_fail(tree)
        for node in ast.walk(tree):
            if isinstance(node, ast.Import):
                names = [alias.name for alias in node.names]
            elif isinstance(node, ast.ImportFrom):
                origin = self._origin(module, node)
                whole = [f"{origin}.{alias.name}" for alias in node.names]
                names = [name if name in self.paths else origin for name in whole]
            elif isinstance(node, ast.Call):
                names = self._by_call(module, node)
            else:
                continue
            for name in dict.fromkeys(names):
                yield Import(self.place(module, node.lineno), module, name, node in may_fail)

    def _origin(self, module: str, node: ast.ImportFrom) -> str:
        """``a.b`` of ``from a.b import``, and of ``from ..b import`` in a module of ``a.c``."""
        return self._absolute(module, node.module or "", node.level)

    def _by_call(self, module: str, node: ast.Call) -> list[str]:
        """What a call of ``import_module`` or ``__import__`` imports, if it says so in plain text."""
        called = node.func.attr if isinstance(node.func, ast.Attribute) else getattr(node.func, "id", None)
        name = node.args[0].value if node.args and isinstance(node.args[0], ast.Constant) else None
        if called not in ("import_module", "__import__") or not isinstance(name, str):
            return []
        relative = name.lstrip(".")
        return [self._absolute(module, relative, len(name) - len(relative))]

    def _absolute(self, module: str, name: str, level: int) -> str:
        if level == 0:
            return name
        is_package = self.paths[module].name == "__init__.py"
        parts = module.split(".")
        package = parts[: len(parts) - level + is_package]
        return ".".join([*package, *([name] if name else [])])

    def all_imports(self) -> Iterator[Import]:
        for module in self.paths:
            yield from self.imports(module)

    def closure(self, module: str) -> set[str]:
        """A module of the tree and every other one that it needs, by way of however many."""
        needed, new = set(), {module}
        while new:
            needed |= new
            new = {found.name for one in new for found in self.imports(one) if found.name in self.paths} - needed
        return needed
