"""What the modules of a tree of Python files import, read from their text: nothing is run."""

import ast
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path


@dataclass(frozen=True)
class Import:
    """One module that another one imports, at the top or inside a function.

    Attributes:
        place: the importing file and line, for messages.
        module: the importing module, with dots.
        name: the module that is imported; of ``from a import b`` it is ``a.b`` where that is a module of the tree, else ``a``.
    """

    place: str
    module: str
    name: str


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
        for node in ast.walk(self.tree(module)):
            if isinstance(node, ast.Import):
                names = [alias.name for alias in node.names]
            elif isinstance(node, ast.ImportFrom):
                origin = self._origin(module, node)
                whole = [f"{origin}.{alias.name}" for alias in node.names]
                names = [name if name in self.paths else origin for name in whole]
            else:
                continue
            for name in dict.fromkeys(names):
                yield Import(self.place(module, node.lineno), module, name)

    def _origin(self, module: str, node: ast.ImportFrom) -> str:
        """``a.b`` of ``from a.b import``, and of ``from ..b import`` in a module of ``a.c``."""
        if node.level == 0:
            return node.module or ""
        is_package = self.paths[module].name == "__init__.py"
        parts = module.split(".")
        package = parts[: len(parts) - node.level + is_package]
        return ".".join([*package, *([node.module] if node.module else [])])

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
