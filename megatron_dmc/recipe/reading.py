"""Reads a recipe: YAML, then ``section.field=value`` overrides, then types, then the base's model, then all checks."""

import os
import re
import select
import stat
from collections.abc import Sequence
from dataclasses import asdict, replace
from pathlib import Path
from typing import Any, ClassVar

import yaml
from omegaconf import OmegaConf
from omegaconf.errors import OmegaConfBaseException

from megatron_dmc.config import ConfigError, saved_dmc_settings
from megatron_dmc.errors import is_too_long_number
from megatron_dmc.files import CHECKPOINT_MARK, why_no_checkpoint
from megatron_dmc.model.model_config import MISSING
from megatron_dmc.recipe.base import model_of_base
from megatron_dmc.recipe.checks import check_recipe
from megatron_dmc.recipe.sections import Recipe
from megatron_dmc.recipe.values import SectionReader, cut, is_null, shown


def load_recipe(path: str | Path, overrides: Sequence[str] = ()) -> Recipe:
    """Reads a YAML recipe and ``section.field=value`` overrides, checks all of it.

    With ``checkpoint.load_base``, what the model section does not give is taken from the base.

    Raises:
        ConfigError: one line: the file or field, the value, and what to do.
    """
    path = Path(path)
    text = _text(path)
    try:
        values = _parsed(text)
        for override in overrides:
            _apply(values, override)
        return _build(_resolved(values), from_person=True)
    except ConfigError as error:
        raise ConfigError(f"recipe {path}: {error}") from None


def recipe_from_dict(values: dict[str, Any]) -> Recipe:
    """The recipe that a checkpoint was written with, all its settings; raises ConfigError as :func:`load_recipe` does."""
    # A damaged file may hold anything; what is no section is refused below.
    if isinstance(values, dict) and isinstance(values.get("dmc"), dict):
        values = {**values, "dmc": saved_dmc_settings(values["dmc"])}
    return _build(values, from_person=False)


def _build(values: dict[str, Any], *, from_person: bool) -> Recipe:
    reader = SectionReader(from_person)
    recipe = reader.section(values, Recipe)
    missing, base = reader.missing, recipe.checkpoint.load_base
    # A saved recipe is whole, and its base may be gone.
    if from_person and base is not None and Path(base).exists():
        if (problem := why_no_checkpoint(Path(base))) is not None:
            raise ConfigError(f"checkpoint.load_base: {problem}")
        given = [name for name, value in values.get("model", {}).items() if value != MISSING]
        recipe = replace(recipe, model=model_of_base(base, {name: getattr(recipe.model, name) for name in given}))
        missing = [name for name in missing if not name.startswith("model.")]
    if missing:
        raise ConfigError(f"{', '.join(missing)} must be given{_where_from(missing, base) if from_person else ''}")
    check_recipe(recipe)
    return recipe


def _where_from(missing: Sequence[str], base: str | None) -> str:
    """Where a model section comes from, for a message."""
    if not any(name.startswith("model.") for name in missing):
        return ""
    if base is None:
        return "; or name a base in checkpoint.load_base: the model section is taken from there"
    return (
        f"; the model section is taken from checkpoint.load_base, but {Path(base) / CHECKPOINT_MARK} is not on this machine: "
        "write the section, or run where the base is"
    )


# How long a pipe may take to bring its first bytes.
SECONDS_TO_WRITE = 10
# A recipe has about a hundred settings. Aliases of aliases can spread to more than memory holds.
MOST_ENTRIES = 100_000


class _Loader(yaml.SafeLoader):
    """Leaves every plain word as text, for the type of its setting to read; refuses tags, and a key that is given twice."""

    # Merge keys and nothing at all are what they are in YAML.
    yaml_implicit_resolvers: ClassVar[dict[str, Any]] = {
        "<": [("tag:yaml.org,2002:merge", re.compile("^<<$"))],
        "": [("tag:yaml.org,2002:null", re.compile("^$"))],
    }

    def compose_node(self, parent: Any, index: Any) -> Any:
        event = self.peek_event()
        tag = getattr(event, "tag", None)
        if tag is not None:
            written = tag.replace("tag:yaml.org,2002:", "!!")
            raise ConfigError(
                f"line {event.start_mark.line + 1}: {written} is a YAML tag, a recipe has none; write the value alone"
            )
        return super().compose_node(parent, index)

    def flatten_mapping(self, node: Any) -> None:
        super().flatten_mapping(node)
        if len(node.value) > MOST_ENTRIES:
            raise ConfigError(
                f"line {node.start_mark.line + 1}: << merges more than {MOST_ENTRIES} settings; write fewer"
            )

    def compose_mapping_node(self, anchor: Any) -> Any:
        node = super().compose_mapping_node(anchor)
        first: dict[str, Any] = {}
        for key, _ in node.value:
            if isinstance(key, yaml.ScalarNode) and first.setdefault(key.value, key) is not key:
                lines = [mark.line + 1 for mark in (key.start_mark, first[key.value].start_mark)]
                raise ConfigError(f"line {lines[0]}: {key.value} is given twice (first in line {lines[1]}); remove one")
        return node


def _text(path: Path) -> bytes:
    """What a recipe holds; raises ConfigError that says what else than a readable file a path names."""
    try:
        mode = path.stat().st_mode
        if stat.S_ISREG(mode):
            return path.read_bytes()
        if stat.S_ISFIFO(mode):
            return _piped(path)
    except (FileNotFoundError, NotADirectoryError):
        raise ConfigError(f"recipe {path} does not exist; examples/ holds recipes to start from") from None
    except OSError as error:
        raise ConfigError(f"recipe {path} cannot be read: {error.strerror}") from None
    what = "a folder; name the YAML file in it" if stat.S_ISDIR(mode) else "a device or a socket; name a YAML file"
    raise ConfigError(f"recipe {path} is {what}")


def _piped(path: Path) -> bytes:
    """What is written into a pipe, such as a shell's ``<(sed ... recipe.yaml)``; raises ConfigError when nothing comes."""
    # Opened plainly, a pipe without a writer would block for good.
    with open(os.open(path, os.O_RDONLY | os.O_NONBLOCK), "rb") as pipe:
        if not select.select([pipe], [], [], SECONDS_TO_WRITE)[0]:
            raise ConfigError(
                f"recipe {path} is a pipe, and nobody wrote into it within {SECONDS_TO_WRITE} s; name a YAML file"
            )
        os.set_blocking(pipe.fileno(), True)
        return pipe.read()


def _parsed(text: bytes) -> dict[str, Any]:
    values = _yaml(text)
    values = {} if values is None else values
    if not isinstance(values, dict):
        raise ConfigError(f"it must hold sections (model, data, phases, ...), got {shown(values):.80}")
    return values


def _copied(value: Any) -> Any:
    """Without what an anchor and its aliases share: an override must change one place only."""
    if isinstance(value, dict):
        return {str(key): _copied(entry) for key, entry in value.items()}
    return [_copied(entry) for entry in value] if isinstance(value, list) else value


def _entries(value: Any, known: dict[int, int]) -> int:
    """How many values there would be without aliases; ``known`` remembers the lists and dicts that were counted."""
    if not isinstance(value, dict | list):
        return 1
    if id(value) not in known:
        parts = value.values() if isinstance(value, dict) else value
        known[id(value)] = 1 + sum(_entries(part, known) for part in parts)
    return known[id(value)]


def _yaml(text: str | bytes) -> Any:
    """Nested lists, dicts and text, none of it shared; raises ConfigError, with the line where there is one."""
    try:
        value = yaml.load(text, _Loader)
        if _entries(value, {}) > MOST_ENTRIES:
            raise ConfigError(f"its aliases spread to more than {MOST_ENTRIES} entries; write what is meant")
        return _copied(value)
    except yaml.MarkedYAMLError as error:
        mark, problem = error.problem_mark or error.context_mark, error.problem or error.context or "not understood"
        place = "" if mark is None else f"line {mark.line + 1}, column {mark.column + 1}: "
        if "'\\t'" in problem:
            problem = "a tab stands where only spaces may; indent with spaces"
        raise ConfigError(f"it is not YAML: {place}{problem}") from None
    except yaml.YAMLError as error:
        raise ConfigError(f"it cannot be read: {_one_line(error)}") from None
    except RecursionError:
        raise ConfigError("it cannot be read: it holds itself, or is nested too deeply") from None


def _apply(values: dict[str, Any], override: str) -> None:
    """Sets ``section.field=value``; a number in the path counts list entries: ``phases.0.steps=100``."""
    key, equals, text = override.partition("=")
    if not equals or not key:
        raise ConfigError(f"override {cut(repr(override))} must read section.field=value")
    try:
        _set(values, re.sub(r"\[(\d+)\]", r".\1", key).split("."), _yaml(text))
    except ConfigError as error:
        raise ConfigError(f"override {cut(repr(override))}: {error}") from None


def _set(values: Any, path: Sequence[str], value: Any, place: str = "") -> None:
    """Sets one entry. Settings are merged into those of a section; a list is replaced as a whole."""
    name, *rest = path
    entry: Any = name
    if isinstance(values, list):
        # Not int() first: it refuses thousands of digits.
        if not name.isdecimal() or len(name) > len(str(MOST_ENTRIES)) or int(name) >= len(values):
            raise ConfigError(f"{place} has no entry {cut(repr(name))}; its {len(values)} entries are counted from 0")
        entry = int(name)
    elif not isinstance(values, dict):
        raise ConfigError(f"{place} is {shown(values)}, it holds no setting {name!r}")
    elif is_null(values.get(name)):
        values[name] = {} if rest else None
    if rest:
        _set(values[entry], rest, value, f"{place}.{name}".removeprefix("."))
    elif isinstance(value, dict) and isinstance(values[entry], dict):
        values[entry].update(value)
    else:
        values[entry] = value


def _resolved(values: dict[str, Any]) -> dict[str, Any]:
    """The same settings with their ``${...}`` replaced; these may also name settings that have their default."""
    whole = asdict(Recipe())
    values = _without_null_sections(values)
    for name, section in values.items():
        both = isinstance(section, dict) and isinstance(whole.get(name), dict)
        whole[name] = {**whole[name], **section} if both else section
    try:
        resolved: Any = OmegaConf.to_container(OmegaConf.create(whole), resolve=True)
    except OmegaConfBaseException as error:
        unset = re.search(r"Environment variable '(.*?)' not found", str(error))
        key = error.full_key or "a setting"
        if unset:
            raise ConfigError(
                f"{key} needs the environment variable {unset[1]}, which is not set; set it, or give a default: "
                f"${{oc.env:{unset[1]},DEFAULT}}"
            ) from None
        if is_too_long_number(error):
            raise ConfigError(f"{key} holds a number of thousands of digits; write a shorter one") from None
        raise ConfigError(f"{key}: {cut(_one_line(error))}") from None
    read = {
        name: {key: resolved[name][key] for key in section} if isinstance(section, dict) else resolved[name]
        for name, section in values.items()
    }
    return _without_null_sections(read)


def _without_null_sections(values: dict[str, Any]) -> dict[str, Any]:
    """A section of nothing is none: it has its defaults."""
    sections = {name for name, default in asdict(Recipe()).items() if isinstance(default, dict)}
    return {name: value for name, value in values.items() if name not in sections or not is_null(value)}


def _one_line(error: BaseException) -> str:
    return str(error).split("\n", maxsplit=1)[0]
