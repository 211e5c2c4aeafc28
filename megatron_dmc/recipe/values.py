"""What a value means for the type of its setting. The type decides, not YAML: ``no`` is a word until a setting is a bool."""

import difflib
import re
import types
import unicodedata
from dataclasses import dataclass, field, fields, is_dataclass
from typing import Any, Literal, TypeVar, Union, get_args, get_origin, get_type_hints

from megatron_dmc.config import ConfigError
from megatron_dmc.errors import shortened
from megatron_dmc.files import LONGEST_NAME, LONGEST_PATH, is_too_long
from megatron_dmc.model.model_config import MISSING
from megatron_dmc.recipe.sections import Recipe

NULL_WORDS = ("null", "none", "~")
TRUE_WORDS = ("true", "yes", "on")
FALSE_WORDS = ("false", "no", "off")
WORDS = (*NULL_WORDS, *TRUE_WORDS, *FALSE_WORDS)
# Beyond this a float no longer holds every whole number.
MOST_EXACT = 2**53
# Characters of a value in a message.
LONGEST_SHOWN = 200
# Unicode's control characters, halves of surrogate pairs, and line and paragraph separators.
_ODD_CATEGORIES = ("Cc", "Cs", "Zl", "Zp")

Section = TypeVar("Section")


@dataclass
class SectionReader:
    """Turns nested plain values into typed sections.

    Attributes:
        from_person: the text comes from a recipe or an override. A path must then not be empty, nor a word such as
            ``None`` or ``false``. Text in a checkpoint stays what it is.
        missing: full names of the settings that must be given and are not; collected, so that one error names them all.
    """

    from_person: bool
    missing: list[str] = field(default_factory=list)

    def section(self, values: Any, kind: type[Section], place: str = "") -> Section:
        """An instance of the dataclass ``kind``; ``place`` is its name in the recipe.

        Raises:
            ConfigError: one line: the setting's full name, its value, and what to write.
        """
        values = {} if values is None or (self.from_person and is_null(values)) else values
        if not isinstance(values, dict):
            raise ConfigError(f"{place or 'a recipe'} must hold settings (name: value), got {shown(values)}")
        prefix, hints, settings = f"{place}." if place else "", get_type_hints(kind), {}
        for name in values:
            if name not in hints:
                raise ConfigError(
                    f"{prefix}{cut(str(name))} is no setting{_suggestion(str(name), prefix, list(hints))}"
                )
        for setting in fields(kind):  # type: ignore[arg-type]  # every section is a dataclass
            name, hint, value = prefix + setting.name, hints[setting.name], values.get(setting.name, MISSING)
            if is_dataclass(hint):
                settings[setting.name] = self.section(values.get(setting.name), hint, name)  # type: ignore[arg-type]
            elif value != MISSING:
                settings[setting.name] = self.value(value, hint, name)
            elif setting.default == MISSING:
                self.missing.append(name)
        try:
            return kind(**settings)
        except ConfigError as error:  # DMCConfig checks itself while it is built
            raise ConfigError(f"{prefix}{error}") from None

    def value(self, value: Any, kind: Any, place: str) -> Any:
        """``value`` as the type ``kind`` of a setting; raises ConfigError as :meth:`section` does."""
        may_be_null = get_origin(kind) in (Union, types.UnionType)
        if may_be_null:
            if value is None or (self.from_person and is_null(value)):
                return None
            (kind,) = (part for part in get_args(kind) if part is not types.NoneType)
        if get_origin(kind) is list:
            if not isinstance(value, list):
                raise ConfigError(f"{place} must be a list, got {shown(value)}; write [a, b], for one [a], for none []")
            return [self.value(entry, get_args(kind)[0], f"{place}[{i}]") for i, entry in enumerate(value)]
        if is_dataclass(kind):
            return self.section(value, kind, place)  # type: ignore[arg-type]
        if kind is str:
            return self._path(value, place, may_be_null)
        choices = [*get_args(kind)] if get_origin(kind) is Literal else []
        found: Any
        if choices:
            found = value if isinstance(value, str) and value in choices else None
        else:
            found = {bool: _as_bool, int: _as_int, float: _as_float}[kind](value)
        if found is None:
            what = f"one of {', '.join(choices)}" if choices else _MEANINGS[kind]
            near = difflib.get_close_matches(str(value).lower(), choices, n=1) if choices else []
            raise ConfigError(
                f"{place} must be {what}{', or null' if may_be_null else ''}, got {shown(value)}"
                + (f"; did you mean {near[0]}?" if near else "")
            )
        return found

    def _path(self, value: Any, place: str, may_be_null: bool) -> str:
        """Text; all text in a recipe is the name of a file or folder, or the start of one."""
        or_null = ", or write null for none" if may_be_null else ""
        if isinstance(value, int | float) and not isinstance(value, bool):
            return str(value)
        if not isinstance(value, str):
            raise ConfigError(f"{place} must be the name of a folder or file, got {shown(value)}{or_null}")
        if self.from_person and not value.strip():
            raise ConfigError(f"{place} is empty; name a folder or file{or_null}")
        if self.from_person and _is_word(value, WORDS):
            raise ConfigError(
                f"{place} must be the name of a folder or file, got {value}{or_null} (./{value} is a folder of that name)"
            )
        if self.from_person and re.match(r"\w+://", value):
            raise ConfigError(f"{place} is an address, {value}; name a folder or file{or_null}")
        if problem := _no_path(value):
            raise ConfigError(f"{place} cannot be the name of a folder or file: {problem}{or_null}")
        return value


def _no_path(text: str) -> str | None:
    """Why no folder or file can have this name; None: one can. Line breaks are refused too: a message is one line."""
    odd = next((character for character in text if unicodedata.category(character) in _ODD_CATEGORIES), None)
    if odd is not None:
        return f"it holds the character U+{ord(odd):04X}; remove it"
    if is_too_long(text):
        return (
            f"{text[:30]}... has {len(text)} characters; one name may have {LONGEST_NAME} bytes, a path {LONGEST_PATH}"
        )
    return None


_MEANINGS = {bool: "true or false", int: "a whole number in decimal digits", float: "a number in decimal digits"}


def is_null(value: Any) -> bool:
    """Whether a person wrote nothing, or a word for nothing."""
    return value is None or _is_word(value, NULL_WORDS)


def cut(text: str) -> str:
    """Text for a message: of a very long one its beginning."""
    text = shortened(text)
    return text if len(text) <= LONGEST_SHOWN else f"{text[:50]}... ({len(text)} characters)"


def shown(value: Any) -> str:
    """A value as YAML writes it, for a message; of a very long one its beginning."""
    return cut(_written(value))


def _written(value: Any) -> str:
    if isinstance(value, dict):
        return f"{{{', '.join(f'{key}: {_written(entry)}' for key, entry in value.items())}}}"
    if isinstance(value, list):
        return f"[{', '.join(map(_written, value))}]"
    if value is None or isinstance(value, bool):
        return {None: "null", True: "true", False: "false"}[value]
    return (
        value if _is_word(value, WORDS) or (isinstance(value, str) and _as_number(value) is not None) else repr(value)
    )


def _is_word(value: Any, words: tuple[str, ...]) -> bool:
    return isinstance(value, str) and value.strip().lower() in words


def _as_bool(value: Any) -> bool | None:
    if _is_word(value, TRUE_WORDS) or _is_word(value, FALSE_WORDS):
        return _is_word(value, TRUE_WORDS)
    return value if isinstance(value, bool) else None


def _as_int(value: Any) -> int | None:
    number = _as_number(value)
    if isinstance(number, float):
        return int(number) if number.is_integer() and abs(number) <= MOST_EXACT else None
    return number


def _as_float(value: Any) -> float | None:
    number = _as_number(value)
    try:
        return None if number is None else float(number)
    except OverflowError:
        return None


def _as_number(value: Any) -> int | float | None:
    """A number as it is, or as people write one: 1_000, 1e-4, .inf. Not 010, which YAML 1.1 takes for 8 and others for 10."""
    if not isinstance(value, str):
        return value if isinstance(value, int | float) and not isinstance(value, bool) else None
    text = re.sub(r"\.(inf|nan)$", r"\1", value.strip().lower())
    if not text.isascii() or re.match(r"[-+]?0[\d_]", text):
        return None
    for number in (int, float):
        try:
            return number(text)
        except ValueError:
            pass
    return None


def _suggestion(name: str, prefix: str, own: list[str]) -> str:
    """What may have been meant, for a message: a setting of another section, or one with a similar name."""
    elsewhere: dict[str, str] = {}
    for section, kind in get_type_hints(Recipe).items():
        kind, place = (kind, section) if is_dataclass(kind) else (get_args(kind)[0], f"{section}[0]")
        for setting in fields(kind):
            elsewhere.setdefault(setting.name, f"{place}.{setting.name}")
    near = difflib.get_close_matches(name, own, n=1)
    if name in elsewhere:
        meant = elsewhere[name]
    elif near:
        meant = prefix + near[0]
    elif near := difflib.get_close_matches(name, elsewhere, n=1, cutoff=0.8):
        meant = elsewhere[near[0]]
    else:
        return f"; {prefix.removesuffix('.') or 'a recipe'} has {', '.join(own)}"
    return f"; did you mean {meant}?"
