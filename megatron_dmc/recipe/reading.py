"""Reads a recipe: YAML over the typed sections, then ``section.field=value`` overrides, then all checks."""

from collections.abc import Sequence
from dataclasses import is_dataclass
from pathlib import Path
from typing import Any, get_origin, get_type_hints

from omegaconf import MISSING, OmegaConf
from omegaconf.errors import OmegaConfBaseException

from megatron_dmc.config import ConfigError
from megatron_dmc.recipe.checks import check_recipe
from megatron_dmc.recipe.sections import Recipe


def load_recipe(path: str | Path, overrides: Sequence[str] = ()) -> Recipe:
    """Reads a YAML recipe and ``section.field=value`` overrides, checks all of it.

    Raises:
        ConfigError: one line: the file or field, the value, and what to do.
    """
    path = Path(path)
    if not path.is_file():
        raise ConfigError(f"recipe {path} does not exist; examples/ holds recipes to start from")
    try:
        values = OmegaConf.load(path)
    except Exception as error:  # PyYAML, OmegaConf and the file system each have errors of their own
        raise ConfigError(f"recipe {path} is not YAML: {_one_line(error)}") from None
    if not OmegaConf.is_dict(values):
        raise ConfigError(f"recipe {path} must hold sections (model, data, phases, ...), not a {type(values).__name__}")
    try:
        for override in overrides:
            _apply(values, override)
        return _build(values)
    except ConfigError as error:
        raise ConfigError(f"recipe {path}: {error}") from None


def _apply(values: Any, override: str) -> None:
    """Sets ``section.field=value``; a number in the path counts list entries: ``phases.0.steps=100``."""
    key, equals, text = override.partition("=")
    if not equals or not key:
        raise ConfigError(f"override {override!r} must read section.field=value")
    try:
        OmegaConf.update(values, key, OmegaConf.from_dotlist([f"value={text}"]).value, force_add=True)
    except Exception as error:  # PyYAML and OmegaConf each have errors of their own
        raise ConfigError(f"override {override!r}: {_one_line(error)}") from None


def recipe_from_dict(values: dict[str, Any]) -> Recipe:
    """The recipe that a checkpoint was written with; raises ConfigError as :func:`load_recipe` does."""
    return _build(OmegaConf.create(values))


def _build(values: Any) -> Recipe:
    _check_shape(OmegaConf.to_container(values, resolve=False), Recipe)
    try:
        recipe = OmegaConf.to_object(OmegaConf.merge(OmegaConf.structured(Recipe), values))
    except ConfigError as error:
        # Only DMCConfig checks itself while it is built.
        raise ConfigError(f"dmc.{error}") from None
    except (OmegaConfBaseException, TypeError, ValueError) as error:
        key = getattr(error, "full_key", None)
        raise ConfigError(f"{key}: {_one_line(error)}" if key else _one_line(error)) from None
    assert isinstance(recipe, Recipe)
    check_recipe(recipe)
    return recipe


def _check_shape(values: Any, section: Any, place: str = "") -> None:
    """Sections hold settings, and lists are lists: OmegaConf's own words for what is not name no field."""
    for name, kind in get_type_hints(section).items():
        value = values.get(name)
        if name not in values or (isinstance(value, str) and "${" in value):
            continue
        if is_dataclass(kind):
            if not isinstance(value, dict):
                raise ConfigError(f"{name} must hold settings (name: value), got {value!r}")
            _check_shape(value, kind, f"{name}.")
        elif get_origin(kind) is list and not isinstance(value, list) and value != MISSING:
            raise ConfigError(f"{place}{name} must be a list, got {value!r}; write [a, b], for one [a]")


def _one_line(error: BaseException) -> str:
    return str(error).split("\n", maxsplit=1)[0]
