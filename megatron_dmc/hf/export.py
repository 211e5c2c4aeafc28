"""The modeling code beside exported weights, so that trust_remote_code needs torch and transformers only."""

import ast
import json
import sys
from collections.abc import Iterator, Mapping
from importlib.resources import files
from pathlib import Path
from typing import NamedTuple

from megatron_dmc.config import ConfigError
from megatron_dmc.files import write_whole
from megatron_dmc.hf.configuration_dmc import DMC_TYPE

PACKAGE = "megatron_dmc"
# What the copies may import beside each other and the standard library; transformers itself needs safetensors.
ALLOWED = frozenset({"torch", "transformers", "safetensors"})
# What they may import in a try block that catches ImportError: they run without it, and transformers does not ask for it.
OPTIONAL = frozenset({"triton"})
# Holds one module per family, with all its classes.
FAMILY_PACKAGE = "megatron_dmc.hf.families"
DMC_CLASS, CAUSAL_LM = "DMC", "ForCausalLM"


def flat_name(module: str) -> str:
    """The name of a module's copy: transformers knows a flat folder only."""
    last = module.rpartition(".")[2]
    return last if last.endswith("_dmc") else module.replace(PACKAGE, "dmc", 1).replace(".", "_")


def auto_map(family: str, architecture: str) -> dict[str, str]:
    """What AutoConfig and the others find in an export.

    Args:
        family: the name of a module of FAMILY_PACKAGE.
        architecture: of the plain model, such as LlamaForCausalLM.
    """
    place = f"{flat_name(f'{FAMILY_PACKAGE}.{family}')}.{DMC_CLASS}{architecture.removesuffix(CAUSAL_LM)}"
    return {"AutoConfig": f"{place}Config", "AutoModel": f"{place}Model", "AutoModelForCausalLM": f"{place}{CAUSAL_LM}"}


def write_modeling_code(folder: Path) -> None:
    """Copies the modeling code into an exported model's folder and names it in its config.json (auto_map).

    Raises:
        ConfigError: there is no config.json, or it is not this model's.
    """
    path = folder / "config.json"
    try:
        config = json.loads(path.read_text(encoding="utf-8"))
        model_type, architectures = config["model_type"], config.get("architectures")
    except (OSError, ValueError, KeyError, TypeError) as error:
        raise ConfigError(f"{path} is not a model's config.json: {error!r}") from None
    family = str(model_type).removeprefix(DMC_TYPE)
    if family == model_type or not _exists(f"{FAMILY_PACKAGE}.{family}"):
        raise ConfigError(f"{path}: model_type must be {DMC_TYPE} and the name of a family, got {model_type!r}")
    if not isinstance(architectures, list) or len(architectures) != 1 or not str(architectures[0]).endswith(CAUSAL_LM):
        raise ConfigError(f"{path}: architectures must name one class that ends in {CAUSAL_LM}, got {architectures!r}")
    for name, text in modeling_code(f"{FAMILY_PACKAGE}.{family}").items():
        write_whole(folder / name, text)
    config["auto_map"] = auto_map(family, architectures[0].removeprefix(DMC_CLASS))
    write_whole(path, json.dumps(config, indent=2, sort_keys=True) + "\n")


class _Target(NamedTuple):
    """One imported name: of ``module``, which is the thing itself where ``name`` is None; bound as ``alias``."""

    module: str
    name: str | None
    alias: str

    def statement(self) -> str:
        flat = flat_name(self.module)
        if self.name is None:
            return f"from . import {flat} as {self.alias}"
        return f"from .{flat} import {self.name}" + (f" as {self.alias}" if self.alias != self.name else "")


class Module(NamedTuple):
    """A module that an export copies: its source, and every import from this package in it, with what it imports."""

    source: str
    imports: list[tuple[ast.ImportFrom, list[_Target]]]

    @classmethod
    def parsed(cls, source: str, name: str) -> "Module":
        """Raises ConfigError for an import that an export cannot have."""
        return cls(source, list(_own_imports(source, name)))


def modeling_code(entry: str) -> dict[str, str]:
    """File names in the flat folder and their contents; ``entry``: the module that transformers starts from."""
    modules = needed_modules(entry)
    texts = {flat_name(name): flat_imports(module) for name, module in modules.items()}
    texts[flat_name(entry)] += _reachable(sorted(set(texts) - {flat_name(entry)}))
    return {f"{flat}.py": text for flat, text in texts.items()}


def needed_modules(entry: str) -> dict[str, Module]:
    """A family's module and every module here that it imports, however far, by name.

    Raises:
        ConfigError: one of them imports what a user of the export need not have, or in a form that cannot be rewritten.
    """
    modules: dict[str, Module] = {}
    new = [entry]
    while new:
        name = new.pop()
        if name not in modules:
            modules[name] = Module.parsed(_source(name), name)
            new += [target.module for _, targets in modules[name].imports for target in targets]
    names: dict[str, str] = {}
    for module in modules:
        if (other := names.setdefault(flat_name(module), module)) != module:
            raise ConfigError(f"{module} and {other} would both be exported as {flat_name(module)}.py; rename one")
    return dict(sorted(modules.items()))


def flat_imports(module: Module) -> str:
    """A module's source with its imports from this package turned into relative ones between the flat folder's files."""
    lines = module.source.splitlines(keepends=True)
    for node, targets in sorted(module.imports, key=lambda each: each[0].lineno, reverse=True):
        indent = " " * node.col_offset
        lines[node.lineno - 1 : node.end_lineno] = [f"{indent}{target.statement()}\n" for target in targets]
    return "".join(lines)


def _own_imports(source: str, module: str) -> Iterator[tuple[ast.ImportFrom, list[_Target]]]:
    """Every import from this package in a module, wherever it stands, with what it imports.

    Raises:
        ConfigError: an import that an export cannot have.
    """
    tree = ast.parse(source)
    optional = set(_optional(tree))
    for node in ast.walk(tree):
        if isinstance(node, ast.Import):
            for alias in node.names:
                if node not in optional or alias.name.split(".")[0] not in OPTIONAL:
                    _check_foreign(alias.name, module, node)
                if _is_own(alias.name):
                    raise _refusal(module, node, f"write it as from {PACKAGE}... import ...")
        elif isinstance(node, ast.ImportFrom):
            origin = _absolute(node, module)
            _check_foreign(origin, module, node)
            if _is_own(origin):
                if any(alias.name == "*" for alias in node.names):
                    raise _refusal(module, node, "name what is imported")
                yield node, [_resolve(origin, alias.name, alias.asname or alias.name) for alias in node.names]


def _optional(tree: ast.Module) -> Iterator[ast.stmt]:
    """Statements that may raise ImportError."""
    for node in ast.walk(tree):
        if isinstance(node, ast.Try) and any(x.type and ast.unparse(x.type) == "ImportError" for x in node.handlers):
            yield from node.body


def _absolute(node: ast.ImportFrom, module: str) -> str:
    if not node.level:
        return node.module or ""
    package = module if _is_package(module) else module.rpartition(".")[0]
    base = package.rsplit(".", node.level - 1)[0] if node.level > 1 else package
    return f"{base}.{node.module}" if node.module else base


def _check_foreign(name: str, module: str, node: ast.stmt) -> None:
    top = name.split(".")[0]
    if not _is_own(name) and top not in ALLOWED and top not in sys.stdlib_module_names:
        raise _refusal(module, node, "an exported model needs torch and transformers only")


def _is_own(name: str) -> bool:
    return name.split(".")[0] == PACKAGE


def _refusal(module: str, node: ast.stmt, reason: str) -> ConfigError:
    return ConfigError(f"{module} cannot be exported, line {node.lineno} reads {ast.unparse(node)!r}: {reason}")


def _resolve(origin: str, name: str, alias: str) -> _Target:
    """Where a name is defined: packages that pass it on are no part of an export."""
    while _is_package(origin):
        passed_on = _passed_on(origin).get(name, (origin, name))
        if passed_on != (origin, name):
            origin, name = passed_on
        elif _exists(f"{origin}.{name}"):
            return _Target(f"{origin}.{name}", None, alias)
        else:
            break
    return _Target(origin, name, alias)


def _passed_on(package: str) -> Mapping[str, tuple[str, str]]:
    """What a package's ``__init__`` imports from this package: module and name there, by the name here."""
    nodes = [node for node in ast.parse(_source(package)).body if isinstance(node, ast.ImportFrom)]
    return {
        alias.asname or alias.name: (_absolute(node, package), alias.name)
        for node in nodes
        if _is_own(_absolute(node, package))
        for alias in node.names
    }


def _reachable(modules: list[str]) -> str:
    """transformers copies only files whose import it reads in this one; a checker's block costs nothing at run time."""
    imports = "".join(f"    from .{module} import *  # noqa: F403\n" for module in modules)
    return f"\n\nfrom typing import TYPE_CHECKING  # noqa: E402\n\nif TYPE_CHECKING:\n{imports}"


def _file(module: str) -> Path:
    """A module's file, or a package's ``__init__``; need not exist."""
    path = Path(str(files(PACKAGE))).joinpath(*module.split(".")[1:])
    return path / "__init__.py" if path.is_dir() else path.with_suffix(".py")


def _exists(module: str) -> bool:
    return _file(module).is_file()


def _is_package(module: str) -> bool:
    return _file(module).name == "__init__.py"


def _source(module: str) -> str:
    try:
        return _file(module).read_text(encoding="utf-8")
    except OSError as error:
        raise ConfigError(f"{module}, which an export needs, cannot be read: {error}") from None
